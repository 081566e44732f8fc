"""Images as people have them: nested folders, lists of classes, other formats, labels of every form in shards."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from lkd.core.errors import UserError
from lkd.data import Dataset, load_dataset
from lkd.data.image_files import LoadingOptions
from lkd.data.sources import HuggingFaceSource

SIZE = LoadingOptions(24, workers=1)


def load(name: str, root: Path) -> Dataset:
    return load_dataset(name, str(root), SIZE)


def paint(value: int) -> Image.Image:
    return Image.fromarray(np.full((30, 30, 3), value, np.uint8))


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    paint(value).save(path)
    return path


def brightness(dataset: Dataset) -> list[int]:
    """Of each test image, to see which it is."""
    pixels, _ = next(dataset.test.load([torch.arange(len(dataset.test))], torch.device("cpu")))
    return [round(float(image.float().mean())) for image in pixels]


@pytest.mark.outside(24)
def test_rows_with_a_path_and_no_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", 7)

    class Table(list):
        def select_columns(self, columns: list[str]) -> "Table":
            return self

    rows: Any = Table(
        [{"image": {"bytes": None, "path": str(path)}}, {"image": {"bytes": path.read_bytes(), "path": "b"}}]
    )
    source = HuggingFaceSource(rows, "image", "mine/train")
    assert [int(source.load(place).float().mean()) for place in (0, 1)] == [7, 7]
    assert not source.names_tell, "rows of a newer revision have the same names"


@pytest.mark.outside(25)
def test_tiny_imagenets_layout(tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        for number in range(3):
            write(tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    rows = [("val_0.JPEG", "n02", 200), ("val_1.JPEG", "n01", 100)]
    for file, _, value in rows:
        write(tmp_path / "val" / "images" / file, value)
    lines = [f"{file}\t{name}\t0\t32\t44\t62\n" for file, name, _ in rows]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    dataset = load("image_folder", tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [1, 0]
    assert brightness(dataset) == [200, 100]
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt: 'n03'"):
        load("image_folder", tmp_path)


def test_a_list_of_files_with_spaces_in_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "train" / name / "0.png")
    for number, value in enumerate((200, 100)):
        write(tmp_path / "val" / f"my cat, {number}.png", value)
    rows = '\ufefffile,label\n"my cat, 1.png",a\n"my cat, 0.png", b\n\n'
    (tmp_path / "val" / "labels.csv").write_text(rows)
    dataset = load("image_folder", tmp_path)
    assert dataset.test.labels.tolist() == [0, 1]
    assert brightness(dataset) == [100, 200]
    for wrong, named in (("2.jp2,a", r"'2\.jp2,a'"), ("../train/a/0.png,a", r"'\.\./train/a/0\.png'")):
        (tmp_path / "val" / "labels.csv").write_text(f"{rows}{wrong}\n")
        with pytest.raises(UserError, match=rf"labels\.csv: {named}"):
            load("image_folder", tmp_path)


def test_a_list_beside_class_folders_is_no_list_of_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            write(tmp_path / part / name / "0.png")
    rows = "picture,class_1,probability_1\na/0.png,b,0.9\nb/0.png,b,0.9\n"  # of lkd predict
    (tmp_path / "val" / "predictions.csv").write_text(rows)
    assert load("image_folder", tmp_path).test.labels.tolist() == [0, 1]


def test_links_to_folders_of_images(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "0.png")
    for part in ("train", "val"):
        for name in ("a", "b"):
            write(tmp_path / part / name / "1.png")
            (tmp_path / part / name / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train" / "a")
    expected = [label for _, label in ImageFolder(tmp_path / "val").samples]
    dataset = load("image_folder", tmp_path)
    assert dataset.test.labels.tolist() == expected == [0, 0, 1, 1]
    assert dataset.train.labels.tolist() == expected, "a circle is left"


@pytest.mark.outside(25)
@pytest.mark.parametrize(
    ("part", "suffix"),
    [("validation", ".bmp"), ("valid", ".tif"), ("test", ".tiff"), ("val", ".gif"), ("val", ".BMP")],
)
def test_names_of_the_test_images_folder_and_formats(part: str, suffix: str, tmp_path: Path) -> None:
    for folder in ("train", part):
        for name in ("a", "b"):
            write(tmp_path / folder / name / f"0{suffix}", 90)
    found = load("image_folder", tmp_path)
    assert found.test.labels.tolist() == [0, 1]
    assert brightness(found) == [90, 90]


@pytest.mark.outside(25)
def test_tars_called_test(tmp_path: Path) -> None:
    for part in ("train", "test"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name in ("a", "b"):
                tar.add(write(tmp_path / "x.bmp"), f"{name}/x.bmp")
    assert load("tar", tmp_path).test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["a/day", "a/night", "b/day", "b/night"], None),
        (["a", "b", "b/more"], None),
        (["./train/a", "train/b"], ("a", "b")),
        (["a/a", "b/b"], ("a", "b")),  # of tars in a tar
    ],
)
def test_folders_in_class_folders_of_a_tar_are_no_classes(folders: list[str], classes: Any, tmp_path: Path) -> None:
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name in folders:
                tar.add(write(tmp_path / "x.bmp"), f"{name}/x.bmp")
    if classes:
        assert load("tar", tmp_path).train.class_names == classes
    else:
        with pytest.raises(UserError, match=r"which are the classes"):
            load("tar", tmp_path)


def write_shards(root: Path, samples: list[dict[str, bytes]]) -> None:
    buffer = io.BytesIO()
    paint(5).save(buffer, "PNG")
    for part in ("train", "val"):
        with tarfile.open(root / f"{part}-0.tar", "w") as tar:
            for number, labels in enumerate(samples):
                for suffix, content in {"png": buffer.getvalue(), **labels}.items():
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


FORMS = {
    "leading zeros": [{"cls": b"00"}, {"cls": b"01"}],
    "upper case": [{"CLS": b"0"}, {"CLS": b"1\n"}],
    "text in JSON": [{"json": json.dumps({"label": label}).encode()} for label in ("0", "1")],
    "names": [{"cls": b"cat"}, {"cls": b"polar bear\n"}],
    "names in JSON": [{"json": json.dumps({"label": label}).encode()} for label in ("cat", "dog")],
    "both": [{"cls": b"0", "json": b'{"label": 0}'}, {"json": b'{"label": "1"}', "cls": b"1"}],
}


@pytest.mark.outside(26)
@pytest.mark.parametrize("form", FORMS)
def test_labels_in_shards(form: str, tmp_path: Path) -> None:
    write_shards(tmp_path, FORMS[form])
    dataset = load("wds/mine", tmp_path)
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 1]
    if "names" in form:
        assert dataset.train.class_names[0] == "cat"


@pytest.mark.outside(26)
def test_labels_that_disagree_are_one_line(tmp_path: Path) -> None:
    write_shards(tmp_path, [{"cls": b"0", "json": b'{"label": 1}'}, {"cls": b"1"}])
    with pytest.raises(UserError, match="another file of that sample"):
        load("wds/mine", tmp_path)
    write_shards(tmp_path, [{"cls": b"0"}, {"cls": b"cat"}])
    with pytest.raises(UserError, match="some labels are numbers"):
        load("wds/mine", tmp_path)
