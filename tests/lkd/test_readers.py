"""Every reader, and packed images, give the same images as the image folder, and say in one line what they miss."""

import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.photographs import add_member, write_web_shards
from lkd.cli import main
from lkd.config import DataRecipe
from lkd.core.errors import UserError
from lkd.data import Batches, Dataset, load_dataset, sources, tars
from lkd.data.image_files import LoadingOptions
from lkd.training.build import prepare_images
from tests.lkd.tiny_images import write_image_folder

CPU = torch.device("cpu")
SIZE = LoadingOptions(24, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Path(write_image_folder(tmp_path_factory.mktemp("images")))


def load(name: str, root: Path) -> Dataset:
    return load_dataset(name, str(root), SIZE)


def contents(dataset: Dataset) -> list[list[tuple[int, int]]]:
    """Label and sum of the pixels of each image, whatever their order."""
    parts = (part.batch(torch.arange(len(part)), CPU) for part in (dataset.train, dataset.test))
    return [
        sorted(
            (int(label), round(float(image.double().sum()), 2)) for image, label in zip(p.images, p.target, strict=True)
        )
        for p in parts
    ]


def write_tar(path: Path, folder: Path, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.JPEG")):
            tar.add(file, prefix + str(file.relative_to(folder)))
    return path


def test_shards_hold_what_the_folder_holds(folder, tmp_path) -> None:
    shards = write_web_shards(folder, tmp_path / "shards", images_per_shard=7)
    dataset = load("wds/tiny", shards)
    assert contents(dataset) == contents(load("image_folder", folder))
    first, second = (Batches(dataset.train, 5, 3, "random_resized_crop") for _ in range(2))
    in_order = [first.at(step) for step in range(6)]
    for step in (5, 1):
        assert torch.equal(second.at(step).images, in_order[step].images), "any image is read at any time"
    info = {"splits": {"train": {"filenames": sorted(path.name for path in shards.glob("train*"))}}}
    info["splits"]["validation"] = {"filenames": ["val-0000.tar"]}
    (shards / "_info.json").write_text(json.dumps(info))
    assert len(load("wds/tiny", shards).test) == 7, "as its _info.json says"


def test_an_index_is_kept_and_made_anew_for_other_files(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "KEPT_FROM", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = write_web_shards(folder, tmp_path / "shards", images_per_shard=7)
    first, beside = load("wds/tiny", shards), shards / ".train.lkd-index"

    def indexed() -> list[str]:
        """Shards whose headers are read in a start, which finds the same images."""
        read: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(sources, "index_tar", lambda path: read.append(path.name) or tars.index_tar(path))
            again = load("wds/tiny", shards)
        assert contents(again) == contents(first)
        assert again.train.images.source.names == first.train.images.source.names
        return sorted(read)

    trained = sorted(path.name for path in shards.glob("train*"))
    assert indexed() == []
    os.utime(shards / trained[1], ns=(5, 5))
    assert indexed() == trained
    assert indexed() == []
    beside.write_bytes(beside.read_bytes()[:-1])
    assert indexed() == trained, "it was damaged"
    beside.unlink()
    beside.mkdir()  # nothing can be written there
    assert indexed() == trained
    assert indexed() == []
    assert len(list((tmp_path / "cache" / "lkd").iterdir())) == 1


def test_an_index_of_tars_is_not_one_of_shards(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tars, "KEPT_FROM", 0.0)
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        for number, shard in enumerate(("0000", "0001")):
            with tarfile.open(tmp_path / part / f"{shard}.tar", "w") as tar:
                for label in (0, 1, 2):
                    add_member(tar, f"{number}{label}.jpg", next(folder.rglob("*.JPEG")).read_bytes())
                    add_member(tar, f"{number}{label}.cls", str(label).encode())
    for _ in range(2):  # by mistake, then as it is meant, and again
        assert load("tar", tmp_path).train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert load("wds/mine", tmp_path).train.labels.tolist() == [0, 1, 2, 0, 1, 2]


def start(root: str, counts: "Queue[int]") -> None:
    read = 0

    def count(path: Path) -> Iterator[tars.Member]:
        nonlocal read
        read += 1
        return tars.index_tar(path)

    tars.KEPT_FROM, sources.index_tar = 0.0, count  # type: ignore[attr-defined]
    load("wds/tiny", Path(root))
    counts.put(read)


def test_one_process_makes_the_index(folder, tmp_path) -> None:
    shards = write_web_shards(folder, tmp_path / "shards", images_per_shard=7)
    context = multiprocessing.get_context("fork")
    counts: Queue[int] = context.Queue()
    processes = [context.Process(target=start, args=(str(shards), counts)) for _ in range(3)]
    for process in processes:
        process.start()
    read = sum(counts.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert read == len(list(shards.glob("*.tar"))), "each once"


def test_a_json_file_gives_the_label_too(folder, tmp_path) -> None:
    picture = next(folder.rglob("*.JPEG")).read_bytes()
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}-0.tar", "w") as tar:
            for number, label in enumerate([1, 0]):
                add_member(tar, f"a/{number}.jpg", picture)
                add_member(tar, f"a/{number}.json", json.dumps({"label": label, "width": 3}).encode())
    assert load("wds/tiny", tmp_path).train.labels.tolist() == [1, 0]


def test_tars_hold_what_the_folder_holds(folder, tmp_path) -> None:
    expected = contents(load("image_folder", folder))
    for part in ("train", "val"):
        write_tar(tmp_path / "whole" / f"{part}.tar", folder / part, "./some/")
        for name in sorted(os.listdir(folder / part)):
            write_tar(tmp_path / "classes" / part / f"{name}.tar", folder / part / name)
        with tarfile.open(write_tar(tmp_path / "nested" / f"{part}.tar", tmp_path / "nothing"), "w") as tar:
            for path in (tmp_path / "classes" / part).iterdir():
                tar.add(path, path.name)
    for layout in ("whole", "classes", "nested"):
        dataset = load("tar", tmp_path / layout)
        assert contents(dataset) == expected, layout
        assert dataset.train.class_names == load("image_folder", folder).train.class_names


def test_hugging_face_tables_hold_what_the_folder_holds(folder, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=sorted(os.listdir(folder / "train")))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    for part, split in (("train", "train"), ("val", "validation")):
        files = sorted((folder / part).rglob("*.JPEG"))
        pictures = [{"bytes": file.read_bytes(), "path": None} for file in files]
        rows = {"image": pictures, "label": [file.parent.name for file in files]}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(tmp_path / "tables" / f"{split}.parquet"))
    dataset = load_dataset(f"hfds/{tmp_path / 'tables'}", str(tmp_path / "cache"), SIZE)
    assert contents(dataset) == contents(load("image_folder", folder))
    (tmp_path / "tables" / "validation.parquet").unlink()
    with pytest.raises(UserError, match="has the splits train; needed are train and one of validation, val, test"):
        load_dataset(f"hfds/{tmp_path / 'tables'}", str(tmp_path / "cache"), SIZE)


def test_torchvisions_data_sets(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "images")
    assert contents(load("torch/image_folder", tmp_path / "images")) == contents(load("image_folder", folder))
    for name in ("imagenett", "places365"):
        with pytest.raises(UserError, match=rf"data\.root: torch/{name}"):
            load(f"torch/{name}", tmp_path)
    with pytest.raises(UserError, match="would test on its training images"):
        load("torch/image_folder", tmp_path / "images" / "train")
    shutil.rmtree(tmp_path / "images" / "val" / "n00000000")  # torchvision numbers the others from 0 then
    with pytest.raises(UserError, match=r"4 classes to train on and 3 for validation \(n00000000"):
        load("torch/image_folder", tmp_path / "images")
    assert load("image_folder", tmp_path / "images").test.labels.tolist() == [1, 1, 2, 2, 3, 3]


def test_shards_that_cannot_be_used_are_one_line(folder, tmp_path) -> None:
    def refuse(message: str, root: str | None = str(tmp_path), name: str = "wds/tiny") -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_dataset(name, root, SIZE)
        assert "\n" not in str(caught.value)

    refuse(r"data\.name: .*nearest: wds/NAME", name="wds")
    refuse(r"data\.root: missing", None)
    refuse(r"data\.root: s3://bucket/shards is a stream", "s3://bucket/shards")
    refuse(r"data\.root: .*no train shards")
    picture = next(folder.rglob("*.JPEG")).read_bytes()

    def write(*labels: bytes | None, part: str = "train") -> None:
        with tarfile.open(tmp_path / f"{part}-0.tar", "w") as tar:
            for number, label in enumerate(labels):
                add_member(tar, f"{number}.jpg", picture)
                if label is not None:
                    add_member(tar, f"{number}.cls", label)

    write(b"0", part="val")
    write(b"0", None, None)
    refuse(r"train-0\.tar: 1\.jpg has no label.* \(2 of its 3 images\)")
    write(b"0", b"[dog]")
    refuse(r"train-0\.tar: 1\.cls holds b'\[dog\]'")
    write(b"0", b"dog")
    refuse("some labels are numbers, others names")
    write(b"0", b"3")
    refuse(r"2 of the 4 classes have no training images in .* \(1, 2\)")
    write(b"0", b"1")
    write(b"2", part="val")
    refuse("label 2 of a validation image")
    whole = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(whole[: len(whole) // 2])
    refuse(r"train-0\.tar: cannot be read as an uncompressed tar \(")
    (tmp_path / "train.tar").write_bytes(whole)
    refuse(r"train\.tar: 0\.jpg lies in no class folder", name="tar")
    (tmp_path / "train.tar").unlink()
    refuse(r"neither train\.tar nor train/CLASS\.tar", name="tar")


def make_arrays(**changed) -> dict[str, np.ndarray]:
    """Arrays of two classes, with validation images; a changed one that is None is left out."""
    rng = np.random.default_rng(0)
    arrays: dict = {}
    for part, count in (("train", 6), ("val", 4), ("test", 3)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8).reshape(-1, 1) % 2
    return {key: value for key, value in (arrays | changed).items() if value is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_they_are(save, tmp_path) -> None:
    arrays = make_arrays(class_names=np.array(["cat", "dog"]))
    save(tmp_path / "pets.npz", **arrays)
    dataset = load("npz/pets", tmp_path)
    images = np.concatenate([arrays["train_images"], arrays["val_images"]])
    assert torch.equal(dataset.train.images, torch.from_numpy(images).movedim(-1, 1))
    assert dataset.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert torch.equal(dataset.test.images, torch.from_numpy(arrays["test_images"]).movedim(-1, 1))
    assert (dataset.name, dataset.test.class_names) == ("npz/pets", ("cat", "dog"))
    assert np.allclose(dataset.test.mean, (images / 255).mean((0, 1, 2)))
    assert np.allclose(dataset.test.std, (images / 255).std((0, 1, 2)))
    grey = {key: value[..., 0] for key, value in arrays.items() if "images" in key}
    flat = {key: value[:, 0].astype(np.int64) for key, value in arrays.items() if "labels" in key}
    save(tmp_path / "grey.npz", **grey, **flat)
    dataset = load("npz/grey", tmp_path)
    assert torch.equal(dataset.train.images[:, 0], torch.from_numpy(images[..., 0]))
    assert dataset.train.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_labels": None}, "no test_labels"),
        ({"train_images": np.zeros((6, 5, 7, 3))}, "train_images is float64"),
        ({"train_images": np.zeros((0, 5, 7, 3), np.uint8)}, r"train_images is uint8, \[0, 5"),
        ({"test_images": np.zeros((3, 5, 7), np.uint8)}, "not all of one shape"),
        ({"train_images": np.zeros((6, 5, 7, 3), np.uint8), "val_images": None}, "same value everywhere"),
        ({"train_labels": np.zeros((6, 14), np.int64)}, "train_labels is int64"),
        ({"train_labels": np.zeros(6)}, "train_labels is float64"),
        ({"train_labels": np.array([0, 1, -1, 0, 0, 0])}, "train_labels has -1"),
        ({"train_labels": np.full(6, 2**62)}, f"train_labels has {2**62}"),
        ({"train_labels": np.full(6, 3)}, r"1 of 4 classes \(first 2\)"),
        ({"test_labels": np.full(3, 2)}, "label 2 of 2 classes"),
        ({"class_names": np.array([1, 2])}, "class_names is int64"),
        ({"class_names": np.array(["cat", 1], object)}, r"class_names\.npy holds pickled objects"),
    ],
)
def test_arrays_that_cannot_be_used_are_one_line(changed: dict, message: str, tmp_path) -> None:
    np.savez(tmp_path / "pets.npz", **make_arrays(**changed))
    with pytest.raises(UserError, match=rf"data\.root: .*pets\.npz: .*{message}") as caught:
        load("npz/pets", tmp_path)
    assert "\n" not in str(caught.value)


def test_arrays_that_are_not_there_are_one_line(tmp_path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "one.npz").write_bytes(b"\x93NUMPY\x01\0")
    for name, field in (("npz/text", "root"), ("npz/one", "root"), ("npz", "name"), ("npz/" + "x" * 300, "root")):
        with pytest.raises(UserError, match=rf"data\.{field}"):
            load(name, tmp_path)
    with pytest.raises(UserError, match=r"data\.root: missing"):
        load_dataset("npz/pets", None)


# ----------------------------------------------------------------------------------------------------------------------
# Packed images.

SIDE = 28  # 7/8 of 32, the shorter side that is packed


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = Path(write_image_folder(tmp_path_factory.mktemp("images")))
    (root / "train" / "n00000002" / "5.JPEG").write_bytes(b"no picture")
    packed = tmp_path_factory.mktemp("packed")
    words = ["--data.name", "image_folder", "--data.root", str(root), "--data.packed", str(packed)]
    assert main(["pack", *words, "--shorter_side", "32"]) == 0
    return root, packed


def read_with(root: Path, packed: Path | None, size: int = SIDE):
    return prepare_images(DataRecipe("image_folder", str(root), 0, 8, image_size=size, packed=packed and str(packed)))


def test_a_part_that_is_packed_stays(folders, tmp_path: Path) -> None:
    packed = shutil.copytree(folders[1], tmp_path / "packed")
    words = ["--data.name", "image_folder", "--data.root", str(folders[0]), "--data.packed", str(packed)]
    for lost, same in (("val.pixels", True), ("train.pixels", False)):
        (packed / lost).unlink()
        before = (packed / "train.index.safetensors").stat().st_ino
        assert main(["pack", *words, "--shorter_side", "32"]) == 0
        assert (packed / lost).read_bytes() == (folders[1] / lost).read_bytes()
        assert ((packed / "train.index.safetensors").stat().st_ino == before) == same


def test_centres_are_those_of_the_files_and_crops_nearly(folders) -> None:
    files, packed = read_with(folders[0], None), read_with(*folders)
    for part in ("train", "meta_validation", "test"):
        ours, theirs = (getattr(images, part) for images in (packed, files))
        batches = [images.batch(torch.arange(len(images)), torch.device("cpu")) for images in (ours, theirs)]
        for column, expected in zip(*batches, strict=True):
            assert torch.equal(column, expected), "the damaged one is left out of both"
    crops = [Batches(images.train, 24, 0, "random_resized_crop").at(1) for images in (packed, files)]
    assert torch.equal(crops[0].index, crops[1].index)
    assert torch.corrcoef(torch.stack([crop.images.flatten() for crop in crops]))[0, 1] > 0.7, "of noise"


def test_what_does_not_belong_to_the_images_is_refused(folders, tmp_path, monkeypatch) -> None:
    def refuse(message: str, root: Path = folders[0], packed: Path = folders[1], size: int = SIDE) -> None:
        with pytest.raises(UserError, match=rf"data\.packed: .*{message}"):
            read_with(root, packed, size)

    refuse("lkd pack", packed=tmp_path)
    with pytest.raises(UserError, match=r"data\.packed: embedded is in memory"):
        prepare_images(DataRecipe(packed=str(folders[1])))
    refuse("shorter side 32, data.image_size 32 needs 37", size=32)
    more = shutil.copytree(folders[0], tmp_path / "more")
    (more / "train" / "n00000000" / "0.JPEG").rename(more / "train" / "n00000000" / "00.JPEG")
    refuse(r"32 train images that are not the 32 of data\.root", root=more)
    (more / "train" / "n00000000" / "00.JPEG").rename(more / "train" / "n00000000" / "0.JPEG")
    read_with(more, folders[1])
    shutil.copy(more / "train" / "n00000001" / "3.JPEG", more / "train" / "n00000000" / "0.JPEG")
    refuse("train images of data.root's names that have other sizes now", root=more)
    cut = shutil.copytree(folders[1], tmp_path / "cut")
    with (cut / "train.pixels").open("r+b") as file:
        file.truncate(1000)
    refuse(r"train\.pixels", packed=cut)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    words = ["--data.name", "image_folder", "--data.root", str(folders[0]), "--data.packed", str(tmp_path / "new")]
    assert main(["pack", *words]) == 2
    assert not list((tmp_path / "new").glob("*")), "nothing is left behind"
    assert main(["pack", "--data.packed", str(tmp_path / "new")]) == 2, "images in memory"
