"""Teachers: live, tabulated, unreliable."""

import dataclasses

import pytest
import torch

from lkd.config import CacheRecipe, DataRecipe, TeacherRecipe
from lkd.core.errors import UserError
from lkd.data import Batches
from lkd.data.embedded import TEACHER
from lkd.export.cache import cache_answers
from lkd.models import build
from lkd.models.files import load_network
from lkd.models.teacher import TabulatedTeacher, Teacher, UnreliableTeacher
from lkd.training import answers as asking
from lkd.training.answers import ask_anew
from lkd.training.build import check_network, open_teacher, prepare_images
from lkd.training.introduce import introduce_teacher
from tests.lkd.parts import prepare_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=300, meta_validation_size=300))


def test_a_table_answers_as_the_network_does(images) -> None:
    teacher = Teacher(build("small_cnn", 10, 1).train())
    table = TabulatedTeacher(teacher, dataclasses.replace(images.train, at_once=70), CPU)
    batch = Batches(images.train, 50, seed=1).at(3)
    torch.testing.assert_close(table(batch).logits, teacher(batch).logits)
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    unknown = [index for index in range(int(images.train.index.max())) if index not in images.train.index]
    others = batch._replace(index=torch.tensor(unknown[:50]))
    assert bool(table(others).logits.isnan().all()), "another image's answer would be taken for theirs"


def test_scaled_logits_wherever_the_teacher_is_asked(images, tmp_path) -> None:
    batch = Batches(images.train, 50, seed=1).at(3)
    plain = TeacherRecipe("random", "tiny_cnn")
    expected = 3 * asking.prepare_teacher(open_teacher(plain, images.train), images, CPU)(batch).logits
    scaled = dataclasses.replace(plain, logit_scale=3.0)
    opened = open_teacher(scaled, images.train)
    for answers in (ask_anew(opened, images, CPU), asking.prepare_teacher(opened, images, CPU)):
        torch.testing.assert_close(answers(batch).logits, expected)
    assert "logits times 3" in introduce_teacher(opened, images, CPU)
    wrong = dataclasses.replace(scaled, random_answers=1.0)
    shuffled = ask_anew(open_teacher(wrong, images.train), images, CPU)(batch).logits
    torch.testing.assert_close(shuffled.sort(1).values, expected.sort(1).values)
    cached = dataclasses.replace(scaled, cache=str(tmp_path / "cache"))
    cache_answers(CacheRecipe(data=images.settings, teacher=cached))
    answers = asking.prepare_teacher(open_teacher(cached, images.train), images, CPU)
    torch.testing.assert_close(answers(batch).logits, expected.half().float())
    other = dataclasses.replace(cached, logit_scale=1.0)
    with pytest.raises(UserError, match=r"teacher\.logit_scale"):
        asking.prepare_teacher(open_teacher(other, images.train), images, CPU)


def test_random_answers_stay_with_the_image(images) -> None:
    reliable = Teacher(build("small_cnn", 10, 1))
    teacher = UnreliableTeacher(reliable, 0.6, seed=0)
    batches = Batches(images.train, 300, seed=1)
    first, second = batches.at(0), batches.at(1)
    assert not torch.equal(first.index, second.index)
    answers = {
        int(i): row for batch in (first, second) for i, row in zip(batch.index, teacher(batch).logits, strict=True)
    }
    torch.testing.assert_close(torch.stack([answers[int(i)] for i in first.index]), teacher(first).logits)
    truth = reliable(first).logits
    changed = (teacher(first).logits != truth).any(1).float().mean()
    assert 0.5 < changed < 0.7
    assert torch.equal(teacher(first).logits.sort(1).values, truth.sort(1).values)


def test_the_embedded_teacher_never_saw_an_embedded_image() -> None:
    header = load_network(TEACHER)[1]
    assert header["provenance"]["recipe"]["data"]["name"] == "fashion_mnist_rest"


def test_a_teacher_that_does_not_fit_is_refused(images, tmp_path) -> None:
    with pytest.raises(UserError, match="has 100 classes, the data set and its students have 10"):
        check_network("t", {"num_classes": 100, "in_chans": 1}, images.train)
    with pytest.raises(UserError, match="has 3 input channels"):
        check_network("t", {"num_classes": 10, "in_chans": 3}, images.train)
    with pytest.raises(UserError, match="no such file"):
        prepare_teacher(TeacherRecipe("missing.safetensors"), DataRecipe(), images, CPU)
