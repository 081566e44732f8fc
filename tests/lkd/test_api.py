"""lkd.distill and lkd.meta_train: the commands' bits, from objects; images and networks of a caller's own."""

import copy
import dataclasses
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import lkd
from lkd.api import describe_images, name_images, name_loss, name_student
from lkd.cli import main
from lkd.config import DataRecipe
from lkd.core.files import read_json
from lkd.core.tensor_files import digest
from lkd.data.arrays import read_images
from lkd.data.image_files import ImageFiles
from lkd.losses import KDLoss
from lkd.losses.learned.file import save_loss
from lkd.meta_training.outer_loop import OuterLoop
from lkd.models import build
from lkd.models.build import adapt_given
from lkd.models.files import load_network
from lkd.models.small import SMALL_NETWORKS
from lkd.models.teacher import load_teacher_network
from lkd.training.build import prepare_images
from lkd.training.training import Training
from tests.lkd.meta_recipes import build_loss_networks, tiny_recipe

SIZES = {"train_size": 200, "meta_validation_size": 100}
TINY = {"epochs": 2, "batch_size": 50, "quiet": True}
META = {"outer_steps": 2, "students_per_step": 1, "rollout_steps": 2, "rollout_epochs": 1, "outer_batch_size": 50}
META |= {"reuse_every": 0, "checkpoint_every": 1}
POOL = {"students": 1, "snapshots": 2}


@pytest.fixture(scope="module")
def images():
    """The images that the recipe with these sizes has."""
    return prepare_images(DataRecipe(**SIZES))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return load_teacher_network("embedded")[0]


COLOURED = (torch.zeros(20, 3, 28, 28, dtype=torch.uint8), torch.arange(20) % 10)


class Plain(nn.Module):
    """A user's own network: logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(images)))


def build_cnn() -> nn.Module:
    return build("small_cnn", 10, 1)


def assert_same_bits(*networks: "nn.Module | Path") -> None:
    first, second = (load_file(each) if isinstance(each, Path) else each.state_dict() for each in networks)
    assert digest(dict(sorted(first.items()))) == digest(dict(sorted(second.items())))


def test_objects_names_and_the_command_line_give_the_same_bits(images, teacher) -> None:
    words = [f"--{group}.{name}={SIZES[name]}" for group, name in (("data", n) for n in SIZES)]
    assert main(["distill", "--run_dir", "cli", *words, "--train.epochs", "2", "--train.batch_size", "50"]) == 0
    named = lkd.distill("small_cnn", "embedded", "embedded", run_dir="named", **SIZES, **TINY)
    torch.manual_seed(0)
    student = build_cnn()
    start = copy.deepcopy(student.state_dict())
    given = lkd.distill(
        student, teacher, images.train, meta_validation_set=images.meta_validation, run_dir="given", **TINY
    )
    assert_same_bits(named.path, Path("cli/student.safetensors"))
    assert_same_bits(given.path, named.path)
    assert_same_bits(given.student, named.student)
    assert given.last == named.last
    assert given.history == named.history
    assert len(given.history) == 2
    assert given.best["top1"] == max(row["top1"] for row in given.history)
    assert given.run_dir == Path("given")
    assert all(torch.equal(student.state_dict()[name], start[name]) for name in start), "the given one stays as it is"
    assert student.training
    assert type(given.student) is type(student)


def test_what_is_given_stays_as_it_is(images, teacher) -> None:
    taught_by = Plain()
    before, random = copy.deepcopy(taught_by.state_dict()), torch.get_rng_state()
    student = Plain()
    torch.set_rng_state(random)
    data = (images.train.images, images.train.labels)
    result = lkd.distill(student, taught_by, data, meta_validation_size=0, **TINY)
    assert (result.history, result.last, result.best) == ([], {}, {})
    assert torch.equal(torch.get_rng_state(), random)
    assert taught_by.training
    assert all(parameter.requires_grad for parameter in taught_by.parameters())
    assert all(torch.equal(taught_by.state_dict()[name], before[name]) for name in before)
    assert isinstance(result.student, Plain)
    assert not result.student.training
    fresh = Plain()
    fresh.load_state_dict(load_file(result.path))
    assert_same_bits(fresh, result.student)
    with pytest.raises(lkd.UserError, match=r"holds the weights of a Plain of the caller's own.*load_state_dict"):
        load_network(result.path)


def test_what_was_trained_on_given_images_is_used_by_commands_that_are_told_of_others(images, teacher, capsys) -> None:
    lkd.distill("tiny_cnn", teacher, images.train, run_dir="r", **TINY)
    student, pixels, labels = "r/student.safetensors", images.train.images[:20, 0].numpy(), np.arange(20) % 10
    np.savez("mine.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    for words, code in ((["--data.name", "npz/mine", "--data.root", "."], 0), ([], 2)):
        assert main(["evaluate", student, *words]) == code
    assert "data.name: r/student.safetensors was trained on images that Python gave" in capsys.readouterr().err
    assert main(["variance", "--run_dir", "r"]) == 2
    assert "run_dir: r was trained with objects that Python gave" in capsys.readouterr().err


def test_a_broken_off_run_of_objects_goes_on_to_the_same_bits(images, teacher, monkeypatch) -> None:
    torch.manual_seed(5)
    student = Plain()
    data, options = (images.train.images, images.train.labels), {**TINY, "checkpoint_every": 3, "loss": KDLoss(0.7)}
    whole = lkd.distill(student, teacher, data, run_dir="whole", **options)
    run_step = Training.run_step
    with monkeypatch.context() as context:
        context.setattr(Training, "run_step", lambda t, *a: run_step(t, *a) if t.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lkd.distill(student, teacher, data, run_dir="cut", **options)
    with pytest.raises(lkd.UserError, match="already holds a run"):
        lkd.distill(student, teacher, data, run_dir="cut", **options)
    for field, other in {
        "teacher.path": {"teacher": Plain()},
        "data.name": {"train_set": (data[0], data[1].flip(0))},
        "student.name": {"student": nn.Sequential(nn.Flatten(), nn.Linear(784, 10))},
    }.items():
        arguments = {"student": student, "teacher": teacher, "train_set": data} | other
        with pytest.raises(lkd.UserError, match=rf"^{field}: is .* a resumed run keeps its config"):
            lkd.distill(**arguments, run_dir="cut", resume="auto", **options)
    # Another start of the same shapes: the checkpoint's weights are what counts.
    resumed = lkd.distill(Plain(), teacher, data, run_dir="cut", resume="auto", **options)
    assert_same_bits(resumed.student, whole.student)
    assert resumed.history == whole.history


def test_meta_training_of_objects_gives_the_bits_of_names_and_goes_on(images, teacher, monkeypatch) -> None:
    options = {**TINY, "epochs": 1, "meta": META, "pool": POOL}
    named = lkd.meta_train("small_cnn", "embedded", "embedded", run_dir="named", **SIZES, **options)
    arguments = (build_cnn, teacher, images.train)
    options["meta_validation_set"] = images.meta_validation
    given = lkd.meta_train(*arguments, run_dir="given", **options)
    assert_same_bits(given.path, named.path)
    assert [row["step"] for row in given.history] == [1, 2]
    loaded = lkd.load_loss(given.path)
    assert_same_bits(loaded, given.loss)
    run_step = OuterLoop.run_step
    with monkeypatch.context() as context:
        context.setattr(OuterLoop, "run_step", lambda loop: run_step(loop) if loop.step < 1 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lkd.meta_train(*arguments, run_dir="cut", **options)
    resumed = lkd.meta_train(*arguments, run_dir="cut", resume="auto", **options)
    assert_same_bits(resumed.path, given.path)


def test_students_of_several_kinds_learn_a_loss_that_trains_another(images, teacher) -> None:
    options = {**TINY, "epochs": 1, "meta": META, "pool": POOL}
    learned = lkd.meta_train([Plain, "tiny_cnn"], teacher, images.train, run_dir="learned", **options)
    by_file = lkd.distill(build_cnn, teacher, images.train, loss=learned.path, run_dir="by_file", **TINY)
    by_module = lkd.distill(build_cnn, teacher, images.train, loss=learned.loss, run_dir="by_module", **TINY)
    by_hand = lkd.distill(build_cnn, teacher, images.train, loss="kd", run_dir="by_hand", **TINY)
    assert_same_bits(by_file.student, by_module.student)
    assert not torch.equal(by_file.student.classifier.weight, by_hand.student.classifier.weight)


def test_a_function_is_a_loss_and_the_config_knows_which(images) -> None:
    def soften(logits: Tensor) -> Tensor:
        return (logits / 4).log_softmax(1)

    def soft(student, teacher, target) -> Tensor:
        return kl_div(soften(student.logits), soften(teacher.logits), log_target=True, reduction="batchmean")

    arguments = ("tiny_cnn", "embedded", images.train)
    lkd.distill(*arguments, loss=soft, run_dir="function", **TINY)
    terms = lambda student, teacher, target, progress: {"soft": soft(student, teacher, target)}  # noqa: E731
    lkd.distill(*arguments, loss=terms, run_dir="terms", **TINY)
    assert_same_bits(Path("function/student.safetensors"), Path("terms/student.safetensors"))
    assert read_json(Path("function/config.json"))["recipe"]["loss"].startswith("object/soft@")
    other = lambda student, teacher, target, progress: {"hard": soft(student, teacher, target)}  # noqa: E731
    with pytest.raises(lkd.UserError, match=r"loss: is .* a resumed run keeps its config"):
        lkd.distill(*arguments, loss=other, run_dir="terms", resume="auto", **TINY)


SOFTNESS = 4.0


def test_a_function_is_known_by_all_that_it_computes_with(monkeypatch) -> None:
    def make(weights, temperature, inner):
        def soften(logits):
            return logits / temperature

        def loss(student, teacher, target, *, scale=weights):
            return scale[0] * soften(student.logits - SOFTNESS) + inner(teacher.logits).sum()

        return loss

    def name(*arguments) -> str:
        return name_loss(make(*arguments), {})

    first = (0.5, 2.0), 1.0, lambda logits: [logit + 1 for logit in logits]
    assert name(*first) == name(*first)
    others = [((0.5, 3.0), *first[1:]), (first[0], 2.0, first[2]), (*first[:2], lambda logits: [x + 2 for x in logits])]
    names = {name(*arguments) for arguments in (first, *others)}
    monkeypatch.setattr(f"{__name__}.SOFTNESS", 5.0)
    assert len(names | {name(*first)}) == 5


def test_teacher_and_loss_are_opened_once_a_run(monkeypatch) -> None:
    save_loss("l.lkd.safetensors", build_loss_networks(tiny_recipe(kind="both")), {})
    opened: Counter[str] = Counter()

    def count(path, **options):
        opened[Path(path).name] += 1
        return safe_open(path, **options)

    monkeypatch.setattr("lkd.core.tensor_files.safe_open", count)
    words = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--train.epochs", "1"]
    assert main(["distill", *words, "--loss", "l.lkd.safetensors", "--run_dir", "d"]) == 0
    assert opened == {"teacher.safetensors": 1, "l.lkd.safetensors": 1}
    opened.clear()
    words += ["--pool.students", "2", "--pool.snapshots", "2", "--pool.loss", "l.lkd.safetensors"]
    assert main(["pool", *words, "--run_dir", "p"]) == 0
    assert opened == {"teacher.safetensors": 1, "l.lkd.safetensors": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, "option: unknown name 'epoch'; nearest: epochs"),
        ({"learning_rate": -1.0}, "train.learning_rate"),
        ({"root": "/data"}, "root: "),
        ({"train_size": 1000}, "data.train_size"),
        ({"student": 3}, "student: 3"),
        ({"student": nn.Flatten()}, "student: this Flatten"),
        ({"student": nn.Linear(3, 10)}, "student: this Linear fails"),
        ({"student": lambda: 3}, "student: the function"),
        ({"student": {"nam": "small_cnn"}}, "student.nam"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(784, 9))}, "teacher: "),
        ({"teacher": "resnet34"}, "teacher.name"),
        ({"train_set": torch.zeros(3)}, "read_images: "),
        ({"teacher": 3}, "teacher: 3"),
        ({"report_test": True}, "report_test"),
        ({"meta_validation_set": "embedded"}, "meta_validation_set"),
        ({"meta_validation_set": COLOURED}, "meta_validation_set: "),
        ({"student": Plain, "loss": "at"}, "the student gives no features"),
    ],
)
def test_a_mistake_is_one_line(change: dict, message: str, images, teacher) -> None:
    arguments = {"student": build_cnn(), "teacher": teacher, "train_set": images.train, **TINY} | change
    with pytest.raises(lkd.UserError, match=message) as caught:
        lkd.distill(**arguments)
    assert "\n" not in str(caught.value)


class RandomFeatures(nn.Module):
    """A head on features that are drawn once and that no file keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(784, 60), persistent=False)
        self.head = nn.Linear(60, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head((images.flatten(1) @ self.projection).relu())


def test_the_student_that_is_returned_is_the_one_that_was_trained(images, teacher) -> None:
    trained = lkd.distill(RandomFeatures, teacher, images.train, seed=3, **TINY | {"epochs": 6})
    others = prepare_images(DataRecipe(train_size=2000)).train
    pixels, labels = others.batch(torch.arange(2000), torch.device("cpu"))[:2]
    right = (trained.student(pixels).argmax(1) == labels).float().mean()
    assert 100 * right == pytest.approx(trained.history[-1]["top1"], abs=12)
    assert right > 0.3


def test_mistakes_of_meta_training(images, teacher) -> None:
    network = Plain()
    for same in (lambda: network, lambda: nn.Sequential(network, nn.Identity())):
        with pytest.raises(lkd.UserError, match="the same weights each time"):
            lkd.meta_train(same, teacher, images.train)
    with pytest.raises(lkd.UserError, match="students: a Plain has one set of weights"):
        lkd.meta_train(Plain(), teacher, images.train)
    with pytest.raises(lkd.UserError, match=r"unknown key 'meta.outer_step'; nearest: meta.outer_steps"):
        lkd.meta_train(Plain, teacher, images.train, meta={"outer_step": 3})
    with ThreadPoolExecutor(1) as executor, pytest.raises(lkd.UserError, match="main thread"):
        executor.submit(lkd.distill, Plain(), teacher, images.train).result()


def test_two_students_of_equal_shapes_are_two_students() -> None:
    given: dict = {}
    first, second = nn.Linear(4, 2), nn.Linear(4, 2)
    names = [name_student(student, given).name for student in (first, second)]
    built = [given[name]() for name in names]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(built, (first, second), strict=True))


# Images and networks of a caller's own.

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)


class Pictures(Dataset):
    """A data set as torchvision has them."""

    def __init__(self, transform=None, target=lambda position: position % 3, turned: int = 0) -> None:
        self.transform, self.target, self.turned, self.damaged = transform, target, turned, -1

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, position: int):
        if position == self.damaged:
            raise OSError("image file is truncated")
        image = Image.fromarray(PIXELS[position]).rotate(self.turned)
        return (self.transform(image) if self.transform else image), self.target(position)


def test_a_dataset_of_pictures_is_read_as_it_is() -> None:
    images = read_images(Pictures(), num_classes=4)
    assert torch.equal(images.images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [position % 3 for position in range(30)]
    assert (images.num_classes, images.class_names, images.image_shape) == (4, ("0", "1", "2", "3"), (3, 6, 5))
    normal = images.normalize(images.images)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3))


def test_floating_point_images_reach_the_networks_as_they_are() -> None:
    pixels, labels = torch.randn(20, 1, 4, 4, dtype=torch.float64), torch.arange(20) % 2
    images = read_images((pixels, labels))
    batch = images.batch(torch.tensor([3, 1]), torch.device("cpu"))
    assert torch.equal(batch.images, pixels[[3, 1]].float())
    assert (images.mean, images.std) == ((0.0,), (1.0,))


def test_pictures_of_a_torchvision_dataset_stay_where_they_are() -> None:
    pictures = Pictures()
    pictures.targets, pictures.classes = [p % 3 for p in range(30)], ["a", "b", "c"]
    images = read_images(pictures, image_size=8, workers=1)
    assert isinstance(images.images, ImageFiles)
    assert images.class_names == ("a", "b", "c")
    assert images.batch(torch.arange(4), torch.device("cpu")).images.shape == (4, 3, 8, 8)
    other = Pictures(turned=90)
    other.targets, other.classes = pictures.targets, pictures.classes
    known, found = (digest(describe_images(read_images(each, image_size=8))) for each in (pictures, other))
    assert known != found, "their names, numbers, do not tell them apart"
    pictures.damaged = 2
    assert images.batch(torch.arange(4), torch.device("cpu")).index.tolist() == [0, 1, 3]
    with pytest.raises(lkd.UserError, match="has no `targets`"):
        read_images(Pictures(), image_size=8)
    pictures.transform = lambda image: image
    with pytest.raises(lkd.UserError, match="would not be used: leave it out"):
        read_images(pictures, image_size=8)


def test_an_image_folder_that_was_cut_down_keeps_its_labels(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 100), ("c", 200)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (9, 9), (value, 0, 0)).save(tmp_path / name / f"{number}.png")
    folder = ImageFolder(tmp_path)
    folder.samples = folder.samples[2:]  # as torchvision's items then are; `imgs` and `targets` are as before
    images = read_images(folder, image_size=8, workers=1)
    pixels, _ = next(images.load([torch.arange(4)], torch.device("cpu")))
    assert [round(float(each[0].float().mean())) for each in pixels] == [100, 100, 200, 200]
    assert images.labels.tolist() == [folder[position][1] for position in range(4)] == [1, 1, 2, 2]
    few = shutil.copytree(tmp_path, tmp_path.parent / "few")
    shutil.rmtree(few / "a")  # torchvision numbers the others from 0 then
    of_few = read_images(ImageFolder(few), image_size=8, num_classes=3)
    whole = read_images(ImageFolder(tmp_path), image_size=8)
    with pytest.raises(
        lkd.UserError, match="meta_validation_set: its class 0 is 'b', that of the training images is 'a'"
    ):
        name_images(whole, of_few, DataRecipe(), {}, {})
    numbered = dataclasses.replace(of_few, class_names=("0", "1", "2"))
    name_images(whole, numbered, DataRecipe(), {}, {})
    own = type("Own", (ImageFolder,), {"__getitem__": lambda self, position: (Image.new("RGB", (8, 8)), 0)})(tmp_path)
    with pytest.raises(lkd.UserError, match="a __getitem__ of its own"):
        read_images(own, image_size=8)
    negative = ImageFolder(tmp_path, loader=lambda path: ImageOps.invert(Image.open(path)))
    inverted, _ = next(read_images(negative, image_size=8).load([torch.tensor([0])], torch.device("cpu")))
    assert int(inverted.min()) == 255, "read by the loader that it was given"


def shift_at_random(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.roll(np.asarray(image), int(torch.randint(6, ())), 0)).movedim(-1, 0)


def crop_some(image: Image.Image) -> Image.Image:
    return image.resize((3, 3)) if image.getpixel((0, 0))[0] > 128 else image


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Pictures(shift_at_random), {}, "its transform is random"),
        (Pictures(crop_some), {}, "make them alike"),
        (Pictures(target=lambda position: "cat"), {}, "label 0 is 'cat'"),
        (Pictures(), {"num_classes": 2}, "label 2 is none of 2 classes"),
        (Pictures(), {"mean": (0.5,), "std": (0.5,)}, "mean has 1 values"),
        (Pictures(), {"mean": (0.5,)}, "mean and std"),
        ([1, 2, 3], {}, "item 0"),
        (iter([]), {}, "neither"),
        ((torch.zeros(4, 3, 3), torch.zeros(4)), {}, "images are torch.float32"),
        ((torch.zeros(4, 1, 3, 3), torch.zeros(4)), {}, "labels are torch.float32"),
        ((torch.zeros(4, 1, 3, 3), torch.zeros(3).long()), {}, r"labels are torch.int64, \[3\]"),
        ((torch.zeros(2, 1, 3, 3), torch.tensor([0, -1])), {}, "a label is -1"),
        ((torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 1])), {}, "is not positive"),
    ],
)
def test_images_that_cannot_be_used_are_refused_in_one_line(source, options: dict, message: str) -> None:
    with pytest.raises(lkd.UserError, match=message) as caught:
        read_images(source, **options)
    assert "\n" not in str(caught.value)


def test_too_large_a_dataset_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lkd.data.arrays.MEMORY_LIMIT", 30 * 6 * 5 * 3 - 1)
    with pytest.raises(lkd.UserError, match=r"take 0.0 GiB of memory, more than 0: give image_size"):
        read_images(Pictures())


def test_a_split_is_known_by_the_images_in_it() -> None:
    images, other = read_images(Pictures()), read_images(Pictures(target=lambda position: position % 2))
    fields, given = {"train_size": 0, "meta_validation_size": 6}, {}
    first, same, another = (
        prepare_images(name_images(each, None, DataRecipe(), fields, given), given) for each in (images, images, other)
    )
    assert first.name == same.name != another.name
    assert first.fingerprint == same.fingerprint != another.fingerprint
    apart = prepare_images(name_images(images, images, DataRecipe(), {}, given), given)
    assert not set(apart.train.index.tolist()) & set(apart.meta_validation.index.tolist())


def test_networks_of_other_libraries_are_read() -> None:
    shape = (1, 28, 28)
    own = SMALL_NETWORKS["small_cnn"](10, 1)
    assert adapt_given(own, "student", 10, shape) is own
    answering = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    answering.forward = lambda images, layers=list(answering): SimpleNamespace(logits=layers[1](layers[0](images)))
    batch = torch.randn(3, *shape)
    adapted = adapt_given(answering, "student", 10, shape)
    assert torch.equal(adapted(batch).logits, answering(batch).logits)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    outputs = adapt_given(model, "teacher", 10, shape)(batch)
    torch.testing.assert_close(outputs.logits, model(batch))
    assert len(outputs.features) > 1, "timm's stages are features"
