"""Valid data sets, small, and their readers."""

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lkd.core.errors import UserError
from lkd.core.tensor_files import write_tensors
from lkd.data import Batch, LoadingOptions, load_dataset
from lkd.data.augment import CROP_NUMBERS, cut_center, cut_random
from lkd.data.image_files import Damage, DamagedImageError, FileSource, as_bytes, decode
from lkd.data.packed import open_packed, pack
from lkd.models.teacher_cache import INDEX, INDEX_KIND, KIND, VERSION, CachedTeacher, compress_logits
from lkd.models.teacher_cache import read_cache as read_cache_folder

SIZE = 16
OPTIONS = LoadingOptions(SIZE, workers=1, damaged_limit=1.0)


def draw_picture(seed: int, format: str = "JPEG") -> bytes:
    """A small random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def use_images(images: torch.Tensor) -> None:
    """Check that what was decoded is an image."""
    assert images.dtype == torch.uint8
    assert images.dim() == 3
    assert images.shape[0] == 3
    assert cut_center(images, SIZE).shape == (3, SIZE, SIZE)
    assert cut_random(images, SIZE, torch.full((CROP_NUMBERS,), 0.4)).shape == (3, SIZE, SIZE)


def write_pictures(folder: Path) -> None:
    """A picture in every format, an animation and one of 16 bits."""
    for suffix, format in ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP"), (".tif", "TIFF")):
        (folder / f"a{suffix}").write_bytes(draw_picture(1, format))
    frames = [Image.open(io.BytesIO(draw_picture(2))) for _ in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(folder / "inks.jpg")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(folder / "deep.png")
    frames[0].save(folder / "progressive.jpg", progressive=True)


def read_picture(path: Path) -> None:
    """Decode a picture and cut crops out of it; a damaged one is skipped."""
    try:
        use_images(decode(as_bytes(path.read_bytes()), path.name))
    except DamagedImageError as error:
        raise UserError("skipped") from error


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_class_tars(folder: Path) -> None:
    """A tar of class folders, and one of tars."""
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{'cd'[number % 2]}/{number}.jpg", draw_picture(number))
    with tarfile.open(folder / "val.tar", "w") as tar:
        for name in "cd":
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as nested:
                add(nested, "0.jpg", draw_picture(3))
            add(tar, f"{name}.tar", inner.getvalue())


def read_tars(path: Path) -> None:
    """Load a data set of tars by class and decode all of it."""
    decode_all("tar", path.parent)


def write_shards(folder: Path) -> None:
    """WebDataset shards with labels of both kinds, and the file that lists them."""
    for part, count in (("train", 3), ("val", 2)):
        with tarfile.open(folder / f"{part}-0.tar", "w") as tar:
            for number in range(count):
                add(tar, f"{number:04d}.jpg", draw_picture(number))
                label = number % 2
                if number:
                    add(tar, f"{number:04d}.cls", str(label).encode())
                else:
                    add(tar, f"{number:04d}.json", json.dumps({"label": label}).encode())
    splits = {name: {"filenames": [f"{part}-0.tar"]} for name, part in (("train", "train"), ("validation", "val"))}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


def read_shards(path: Path) -> None:
    """Load shards and decode all of them."""
    decode_all("wds/fuzz", path.parent)


def decode_all(name: str, root: Path) -> None:
    """Load a data set and decode its images; no name of a file may lead out of the root."""
    dataset = load_dataset(name, str(root), OPTIONS)
    for part in (dataset.train, dataset.test):
        for file in part.images.source.paths:
            assert Path(file).resolve().is_relative_to(root.resolve()), f"{file} is outside of {root}"
        part.batch(torch.arange(len(part)), torch.device("cpu"))


def write_packed(folder: Path) -> None:
    """Packed images, and the images that they were made of."""
    (folder / "images").mkdir()
    for number in range(3):
        (folder / "images" / f"{number}.jpg").write_bytes(draw_picture(number))
    pack(source_of(folder), folder / "packed", "train", 19, 1, Damage(), str)


def source_of(folder: Path) -> FileSource:
    """The images that were packed."""
    return FileSource(folder / "images", [f"{number}.jpg" for number in range(3)])


def read_packed(path: Path) -> None:
    """Open packed images and look at each."""
    packed = open_packed(source_of(path.parents[1]), path.parent, "train", SIZE)
    for position in range(len(packed)):
        try:
            use_images(packed.load(position))
        except DamagedImageError:
            continue


def write_cache(folder: Path) -> None:
    """A teacher cache of two files, and one with the largest logits alone."""
    index = torch.arange(3, 9)
    header = {"made_with": {"teacher": {"name": "x"}}, "top_k": 2, "shard_size": 4, "num_classes": 10, "teacher": "x"}
    write_tensors(folder / "cache" / INDEX, {"index": index}, INDEX_KIND, VERSION, header)
    cache = read_cache_folder(folder / "cache")
    for shard, rows in enumerate(index.split(4)):
        kept = compress_logits(torch.randn(len(rows), 10), 2)
        write_tensors(cache.path(1, shard), kept, KIND, VERSION, {"cache": cache.fingerprint})


def read_cache(path: Path) -> None:
    """Open a cache and look all of it up."""
    cache = read_cache_folder(path.parent)
    teacher = CachedTeacher(cache, range(1, 2), torch.device("cpu"))
    batch = Batch(torch.zeros(len(cache.index), 0), cache.index, cache.index, torch.ones_like(cache.index))
    assert teacher(batch).logits.shape == (len(cache.index), cache.header["num_classes"])


def write_idx(folder: Path) -> None:
    """Files of the form of Fashion-MNIST's, with fewer images: those are refused, for their number."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 3)):
        head = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + bytes(count * 28 * 28))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(range(count)))


def read_idx(path: Path) -> None:
    """Load Fashion-MNIST."""
    load_dataset("fashion_mnist", str(path.parents[2]))
