"""What users of other projects ran into without a word: each is right here, or one line says what is wrong."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import lkd
from lkd import api
from lkd.cli import main
from lkd.config import CompareRecipe, DataRecipe, DistillRecipe, ExportRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.data.arrays import read_images
from lkd.data.images import ImageSet
from lkd.data.readers import load_dataset
from lkd.export.export import export
from lkd.losses.learned.loss import build_learned_loss
from lkd.meta_training.log import describe_audit
from lkd.models.build import LogitNetwork, adapt_given, adapt_pretrained, build, unwrap
from lkd.models.files import fit_to_images, load_network, save_network
from lkd.models.teacher import Teacher, load_teacher
from lkd.tracking.run import describe_precision, open_run
from lkd.training.build import Images, choose_student, open_teacher, prepare_images
from lkd.training.introduce import explain_doubts, introduce_teacher
from lkd.training.training import build_autocast
from meta.audit import Audit, Audited
from tests.lkd.test_outside_images import draw
from tests.lkd.tiny_images import write_image_folder


@pytest.mark.outside(11)
@pytest.mark.parametrize("name", ["embedded", "image_folder"])
def test_all_images_are_trained_on_by_default(name: str, tmp_path) -> None:
    root = write_image_folder(tmp_path, classes=4, train=10) if name == "image_folder" else None
    images = prepare_images(DataRecipe(name, root, image_size=24))
    count = {"embedded": 12_000, "image_folder": 40}[name]
    assert (len(images.train), len(images.meta_validation)) == (count * 9 // 10, count // 10)


@pytest.mark.outside(4)
@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\ntrain: {epochs: 2}\nrun_dir: r\ntrain: {batch_size: 5}\n",
        "train:\n  epochs: 2\n  batch_size: 5\n  epochs: 1\n",
        "methods:\n  - {name: kd, weight: 1, name: dkd}\n",
        '{"seed": 1, "train": {}, "seed": 2}',
    ],
)
def test_a_key_twice_is_an_error_with_both_lines(text: str, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml: .*lines \d and \d: the key '(train|epochs|name|seed)'"):
        parse_recipe("distill", ["recipe.yaml"])


@pytest.mark.outside(4)
@pytest.mark.parametrize("words", [["--loss", "{name: kd, weight: 1, name: dkd}"], ["--loss={name: kd, name: dkd}"]])
def test_a_key_twice_on_the_command_line(words: list[str]) -> None:
    with pytest.raises(UserError, match="'name'"):
        parse_recipe("distill", words)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.outside(5)
def test_a_users_folder_in_every_path_of_a_recipe(home: Path) -> None:
    (home / "base.yaml").write_text("data: {root: ~/images}\nloss: {name: ~/loss.lkd.safetensors}\n")
    Path("recipe.yaml").write_text('base: "~/base.yaml"\nrun_dir: ~/run\n')
    words = ["--teacher.path", "~/t.pth", "--teacher.cache=~/cache", "--data.packed", "~/packed"]
    words += ["--data.name", "hfds/~/x"]
    for file in ("recipe.yaml", "--config=~/../recipe.yaml"):
        recipe = parse_recipe("distill", [file, *words])
        found = [recipe.run_dir, recipe.data.root, recipe.loss["name"], recipe.teacher.path, recipe.teacher.cache]
        assert found == [f"{home}/{name}" for name in ("run", "images", "loss.lkd.safetensors", "t.pth", "cache")]
        assert (recipe.data.packed, recipe.data.name) == (f"{home}/packed", f"hfds/{home}/x")
    assert parse_recipe("distill", ["--wandb.name", "a~b"]).wandb.name == "a~b"
    other = parse_recipe("export", ["--checkpoint", "~/s.safetensors", "--out_dir", "~/out"])
    assert (other.checkpoint, other.out_dir) == (f"{home}/s.safetensors", f"{home}/out")


@pytest.mark.outside(5)
def test_a_users_folder_in_python(home: Path) -> None:
    lkd.save_loss("~/l.lkd.safetensors", build_learned_loss("logits", {}), {})
    assert lkd.load_loss("~/l.lkd.safetensors") is not None
    save_network(
        Path("~/t.safetensors"), build("tiny_cnn", 10, 1), {"name": "tiny_cnn", "num_classes": 10, "in_chans": 1}, {}
    )
    given: dict = {}
    assert api.name_teacher("~/t.safetensors", given).path == f"{home}/t.safetensors"
    assert api.name_loss({"name": "~/l.lkd.safetensors"}, given) == {"name": f"{home}/l.lkd.safetensors"}
    assert not Path("~").exists()


@pytest.mark.outside(6)
def test_class_folders_of_numbers_and_a_class_map(tmp_path) -> None:
    for part, number in ((part, number) for part in ("train", "val") for number in range(12)):
        (folder := tmp_path / part / str(number)).mkdir(parents=True)
        (folder / "1.png").write_bytes(draw())
    assert load_dataset("image_folder", str(tmp_path)).train.class_names[2] == "10", "as torchvision's ImageFolder"
    (tmp_path / "classes.txt").write_text("".join(f"{number}\n" for number in range(12)))
    recipe = DataRecipe("image_folder", str(tmp_path), meta_validation_size=0, class_map=str(tmp_path / "classes.txt"))
    images = prepare_images(recipe, scored=False)
    files = [images.train.images.name(slot) for slot in range(12)]
    assert [int(name.split("/")[0]) for name in files] == images.train.labels.tolist()
    assert images.test.class_names[2] == "2"
    words = ["--data.name", "image_folder", "--data.root", str(tmp_path), "--data.class_map", recipe.class_map]
    words += ["--data.image_size", "24", "--data.meta_validation_size", "0", "--train.epochs", "1"]
    assert main(["teacher", *words, "--train.batch_size", "4", "--model.name", "tiny_cnn", "--run_dir", "t"]) == 0
    assert main(["evaluate", "t/teacher.safetensors", "--device", "cpu"]) == 0, "the file says its last part only"
    (tmp_path / "classes.txt").write_text("0\n1\n")
    with pytest.raises(UserError, match=r"data\.class_map"):
        prepare_images(recipe, scored=False)


@pytest.mark.outside(6)
@pytest.mark.parametrize(("top1", "warned"), [(9.0, ["chance", "order it"]), (16.0, ["order it"]), (95.0, [])])
def test_a_teacher_that_may_have_another_order_is_doubted(top1: float, warned: list[str]) -> None:
    names = tuple(sorted(map(str, range(12))))
    labels = torch.arange(12).repeat(100)
    part = ImageSet(torch.zeros(1200, 1, 1, 1), labels, torch.arange(1200), names, (0.0,), (1.0,))
    said = explain_doubts(top1, Images("x", part, part, part, ""), TeacherRecipe(path="t.pth"))
    assert [word for word in ("chance", "order it") if word in said] == warned


@pytest.mark.outside(7)
def test_labels_from_one_are_said() -> None:
    images, labels = torch.randint(0, 256, (12, 1, 4, 4)).to(torch.uint8), torch.arange(12) % 3
    with pytest.raises(UserError, match="class 0"):
        read_images((images, labels + 1))
    named = torch.utils.data.TensorDataset(images, labels + 1)
    named.classes = ["a", "b", "c"]
    with pytest.raises(UserError, match="class 0"):
        read_images(named)
    assert read_images((images, labels + 1), num_classes=4).num_classes == 4


class Writing(nn.Module):
    """A network that normalises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.sub_(0.5).flatten(1))


def make_pixels(count: int = 30, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 256, (count, channels, 4, 4)).to(torch.uint8), torch.arange(count) % 3


@pytest.mark.outside(8)
def test_a_teacher_that_writes_into_its_input_leaves_the_students_alone() -> None:
    images = read_images(make_pixels())
    batch = images.batch(torch.arange(5), torch.device("cpu"))
    before = batch.images.clone()
    teacher = Teacher(LogitNetwork(Writing()))
    first, second = teacher(batch).logits, teacher(batch).logits
    assert torch.equal(batch.images, before)
    assert torch.equal(first, second)


@pytest.mark.outside(8)
def test_a_student_that_writes_into_its_input_is_refused() -> None:
    with pytest.raises(UserError, match="student: this Writing"):
        adapt_given(Writing(), "student", 3, (1, 4, 4))


def distill_tiny(student, teacher=None, **options) -> "lkd.api.Distilled":
    teacher = teacher or nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    options = {"epochs": 1, "batch_size": 9, "quiet": True, "device": "cpu", "loss": "kd"} | options
    return lkd.distill(student, teacher, make_pixels(), **options)


@pytest.mark.outside(9)
def test_a_slow_average_of_a_short_training_is_trained() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    start = student[1].weight.detach().clone()
    fast, slow = (
        distill_tiny(student, run_dir=f"d{d}", ema_decay=d, epochs=5).student[1].weight for d in (0.0, 0.9999)
    )
    assert (slow - start).norm() > 0.1 * (fast - start).norm()


@pytest.mark.outside(10)
@pytest.mark.parametrize("compiled", ["whole", "part", "parallel"])
@torch._dynamo.config.patch(disable=True)
def test_a_compiled_students_file_is_the_plain_networks(compiled: str) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    if compiled == "part":
        student = nn.Sequential(nn.Flatten(), torch.compile(nn.Linear(16, 3), backend="eager"))
    else:
        whole = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        student = torch.compile(whole, backend="eager") if compiled == "whole" else nn.DataParallel(whole)
    result = distill_tiny(student)
    plain.load_state_dict(load_file(result.path))
    images = torch.randn(4, 1, 4, 4)
    torch.testing.assert_close(plain(images), result.student(images))


def write_pixels(path: Path, channels: int = 3, names: tuple[str, ...] = ("a", "b", "c"), shift: int = 0) -> DataRecipe:
    generator = np.random.default_rng(shift)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = generator.integers(shift, 256, (60, 32, 32, channels), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(60) % 3
    np.savez(path, **arrays, class_names=np.array(names))
    return DataRecipe(f"npz/{path.stem}", str(path.parent))


@pytest.mark.outside(12)
def test_a_file_is_used_in_its_own_normalisation(tmp_path) -> None:
    """On images that are normalised otherwise its answers are the same."""
    own = prepare_images(write_pixels(tmp_path / "own.npz")).train
    other = dataclasses.replace(own, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    architecture = {"name": "tiny_cnn", "num_classes": 3, "in_chans": 3}
    network = build(**architecture).eval()
    save_network(tmp_path / "t.safetensors", network, architecture, {}, own)
    expected = network(own.batch(torch.arange(9), torch.device("cpu")).images).logits
    for images in (own, other):
        loaded, _ = load_teacher(images, str(tmp_path / "t.safetensors"))
        found = loaded(images.batch(torch.arange(9), torch.device("cpu")).images).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.outside(12)
def test_a_file_that_does_not_say_its_normalisation_is_said(tmp_path) -> None:
    images = prepare_images(write_pixels(tmp_path / "own.npz"))
    architecture = {"name": "tiny_cnn", "num_classes": 3, "in_chans": 3}
    for name, part in (("old", None), ("new", images.train)):
        save_network(tmp_path / f"{name}.safetensors", build(**architecture), architecture, {}, part)
        teacher = open_teacher(TeacherRecipe(str(tmp_path / f"{name}.safetensors")), images.train)
        assert ("normalised as the student" in introduce_teacher(teacher, images, torch.device("cpu"))) == (
            name == "old"
        )


@pytest.mark.outside(12)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pretrained_student_is_fed_its_own_normalisation(channels: int, tmp_path, monkeypatch) -> None:
    images = prepare_images(write_pixels(tmp_path / "own.npz", channels)).train
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made(name, **options | {"pretrained": False}))
    model = ModelRecipe("test_vit.r160_in1k", pretrained=True, options={"img_size": 32})
    student = choose_student(model, images).build(0, torch.device("cpu")).eval()
    cfg = timm.get_pretrained_cfg(model.name)
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (cfg.mean, cfg.std))
    pixels = images.images[:4] / 255
    expected = unwrap(student)((pixels - mean) / std)
    torch.testing.assert_close(student(images.normalize(images.images[:4])).logits, expected, rtol=1e-3, atol=1e-4)
    architecture = {"name": model.name, "num_classes": 3, "in_chans": channels, "options": model.options}
    save_network(tmp_path / "s.safetensors", student, architecture, {}, images)
    network, header = load_network(tmp_path / "s.safetensors")
    assert header["input"]["mean"] == pytest.approx(cfg.mean[:channels])
    again = fit_to_images("s", network, header, images)(images.normalize(images.images[:4])).logits
    torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.outside(12)
def test_normalised_pixels_that_do_not_say_how_are_not_normalised_twice(tmp_path) -> None:
    images = read_images((torch.randn(6, 3, 32, 32), torch.arange(6) % 3))
    network = build("test_vit", 3, options={"img_size": 32})
    with pytest.raises(UserError, match="mean, std"):
        adapt_pretrained(network, images)
    grey = read_images((images.images[:, :1], images.labels))
    with pytest.raises(UserError, match="mean, std"):
        load_teacher(grey)  # embedded
    architecture = {"name": "tiny_cnn", "num_classes": 3, "in_chans": 3}
    save_network(tmp_path / "s.safetensors", build(**architecture), architecture, {}, images)
    assert "input" not in load_network(tmp_path / "s.safetensors")[1], "nobody knows how to prepare pictures for it"
    said = read_images((images.images, images.labels), mean=[0.5] * 3, std=[0.25] * 3)
    for each in (said, read_images((images.images.sigmoid(), images.labels))):
        adapt_pretrained(network, each)


@pytest.mark.outside(12)
def test_an_exported_student_is_one_of_timms(tmp_path) -> None:
    images = prepare_images(write_pixels(tmp_path / "own.npz")).train
    architecture = {"name": "test_resnet", "num_classes": 3, "in_chans": 3, "options": {}}
    network = build(**architecture).eval()
    provenance = {"image_shape": list(images.image_shape)}
    save_network(tmp_path / "s.safetensors", network, architecture, provenance, images)
    export(ExportRecipe(str(tmp_path / "s.safetensors"), str(tmp_path / "out"), ["safetensors"]))
    read = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(read(pixels), network(pixels).logits)
    found = timm.data.resolve_data_config(model=read)
    assert (found["mean"], found["std"]) == (pytest.approx(images.mean), pytest.approx(images.std))
    assert (found["input_size"], found["interpolation"], found["crop_pct"]) == ((3, 32, 32), "bilinear", 1.0)
    assert list(read.pretrained_cfg["label_names"]) == ["a", "b", "c"]


@pytest.mark.outside(12)
def test_a_trained_students_file_says_how_to_use_it() -> None:
    words = "--data.train_size 50 --data.meta_validation_size 20 --train.epochs 1 --train.batch_size 25 --loss kd"
    assert main(["distill", *words.split(), "--student.name", "tiny_cnn", "--device", "cpu"]) == 0
    header = load_network(Path("runs/run/student.safetensors"))[1]
    assert header["classes"][:2] == ["T-shirt/top", "Trouser"]
    assert header["input"] == {
        **{"input_size": [1, 28, 28], "mean": [0.286], "std": [0.353]},
        **{"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"},
    }


@pytest.mark.outside(13)
def test_a_teachers_file_of_other_classes_is_said(tmp_path, caplog) -> None:
    own = prepare_images(write_pixels(tmp_path / "own.npz")).train
    architecture = {"name": "tiny_cnn", "num_classes": 3, "in_chans": 3}
    save_network(tmp_path / "t.safetensors", build(**architecture), architecture, {}, own)
    file = str(tmp_path / "t.safetensors")
    load_teacher(own, file)
    load_teacher(dataclasses.replace(own, class_names=("0", "1", "2")), file)
    assert not caplog.records, "the same names, and names that nobody gave"
    load_teacher(dataclasses.replace(own, class_names=("a", "b", "d")), file)
    assert "class 2 is 'c' in the file, 'd' in the data" in caplog.text
    with pytest.raises(UserError, match=r"data\.class_map"):
        load_teacher(dataclasses.replace(own, class_names=("a", "c", "b")), file)
    for names in (("0", "1", "2"), ("0", "2", "1")):  # of folders, which are names too
        numbered = dataclasses.replace(own, class_names=names)
        save_network(tmp_path / "t.safetensors", build(**architecture), architecture, {}, numbered)
        load_teacher(numbered, file)
        with pytest.raises(UserError, match=r"data\.class_map"):
            load_teacher(dataclasses.replace(own, class_names=("2", "1", "0")), file)


@pytest.mark.outside(14)
@pytest.mark.parametrize(("capability", "bfloat16"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_only_where_the_gpu_has_it(capability: tuple[int, int], bfloat16: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda")
    assert build_autocast(TrainRecipe(), device).keywords["enabled"] == bfloat16
    assert build_autocast(TrainRecipe(precision="bfloat16"), device).keywords["enabled"]
    said = describe_precision(DistillRecipe(), device)
    assert bfloat16 == (not said)
    assert bfloat16 or all(word in said[0] for word in ("train.precision", "float32", "bfloat16", "7."))


@pytest.mark.outside(15)
@pytest.mark.parametrize("command", ["distill", "meta-train", "compare"])
def test_what_decides_digits_is_said_where_a_run_goes_on(command: str) -> None:
    kind = {"distill": DistillRecipe, "meta-train": MetaTrainRecipe, "compare": CompareRecipe}[command]
    recipe = kind(run_dir="r", resume="auto", device="cpu", threads=1)
    for again in (False, True, True):
        with open_run(recipe, command):
            pass
        said = Path("r/output.txt").read_text() if Path("r/output.txt").exists() else ""
        assert ("threads 1 (before 3)" in said and "torch " in said and "pillow " in said) == again
        environment = json.loads(Path("r/environment.json").read_text())
        environment["versions"] |= {"torch": "1.0", "pillow": "1.0"}
        Path("r/environment.json").write_text(json.dumps(environment | {"threads": 3}))
        recipe = dataclasses.replace(recipe, **({"join": True} if command == "compare" else {}))


@pytest.mark.outside(15)
def test_what_decides_digits_is_said_where_a_cache_goes_on(capsys) -> None:
    words = "cache --data.train_size 20 --data.meta_validation_size 20 --teacher.cache c --device cpu --threads 1"
    for precision, said in (("float32", False), ("float32", False), ("bfloat16", True)):
        assert main([*words.split(), "--train.precision", precision]) == 0
        assert ("precision bfloat16 (before float32)" in capsys.readouterr().out) == said


@pytest.mark.outside(16)
def test_an_audit_is_said_in_words() -> None:
    estimator = Audited()
    assert describe_audit(estimator, 1, "") == ""
    estimator.audits[0] = Audit(0.996, 75.0, 0.1, {})
    said = describe_audit(estimator, 1, "")
    assert all(word in said for word in ("0.996", "75 times", "first_order is kept"))
    assert describe_audit(estimator, 2, said) == "", "once"
    estimator.exact = True
    assert "adjoint" in describe_audit(estimator, 3, said)


@pytest.fixture
def example():
    pytest.importorskip("lightning")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import lightning_module

    return lightning_module


@pytest.mark.outside(17)
def test_lightning_logs_the_whole_loss_whatever_is_accumulated(example, monkeypatch) -> None:
    lkd.save_loss("l.lkd.safetensors", build_learned_loss("logits", {}), {})
    logged, losses, step = [], [], example.Distillation.training_step

    def watched(module, batch, number):
        result = step(module, batch, number)
        losses.append(float(result["loss"]))
        return result

    monkeypatch.setattr(example.Distillation, "training_step", watched)
    monkeypatch.setattr(example.Distillation, "log_dict", lambda module, values, **_: logged.append(dict(values)))
    example.run("l.lkd.safetensors", images=128, epochs=1, accumulate_grad_batches=2)
    assert [float(row["loss"]) for row in logged] == pytest.approx(losses)


@pytest.mark.outside(17)
@pytest.mark.parametrize(("steps", "seconds", "progress"), [(20, 4, 0.4), (10, 1, 0.5), (-1, 3, 0.3)])
def test_lightning_progress_is_of_time_too(example, steps: float, seconds: float, progress: float) -> None:
    timer = example.Timer({"seconds": 10})
    timer.time_elapsed = lambda stage=None: seconds
    timer.time_remaining = lambda stage=None: 10 - seconds
    trainer = SimpleNamespace(global_step=5, estimated_stepping_batches=steps, callbacks=[timer])
    assert example.measure_progress(trainer) == pytest.approx(progress)
