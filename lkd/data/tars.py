"""Images in tar files, found by their offsets: any of them can be read at any time, as from files of their own."""

import hashlib
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.core.files import KEPT_FROM, MALFORMED, find_cache, lock_folder
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.data.image_files import ImageSource, is_hidden

MOST_NESTED = 3  # tars in tars
KIND, VERSION = "index of tar files", 1

Label = int | str


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
        name: Its path; that of a member of a tar in the tar begins with the inner one's name.
        start: Where its bytes begin in the outer file.
        size: How many there are.
    """

    name: str
    start: int
    size: int


class TarSource(ImageSource):
    """Images in tar files.

    Args:
        paths: The tar files.
        names: Of each image.
        places: Of each image the position of its tar file, where it begins there and its bytes; int64, [N, 3].
    """

    def __init__(self, paths: list[Path], names: list[str], places: Tensor) -> None:
        self.paths = [str(path) for path in paths]
        self.names = names
        self.places = places

    @classmethod
    def of(cls, paths: list[Path], members: list[tuple[int, Member]]) -> "TarSource":
        """Of members, each with the position of its tar file."""
        names = [f"{paths[tar].name}/{member.name}" for tar, member in members]
        places = torch.tensor([(tar, member.start, member.size) for tar, member in members], dtype=torch.int64)
        return cls(paths, names, places.view(-1, 3))

    def read(self, position: int) -> Tensor:
        """The bytes of a member."""
        tar, start, size = self.places[position].tolist()
        return torch.from_numpy(np.fromfile(self.paths[tar], np.uint8, size, offset=start))

    def sizes(self) -> Tensor:
        return self.places[:, 2]


def index_tar(path: Path) -> Iterator[Member]:
    """List the files in a tar file, those of tars in it too; only headers are read."""
    try:
        with path.open("rb") as file:
            yield from index_stream(file, "", 0, path.stat().st_size)
    except (tarfile.TarError, OSError, *MALFORMED) as error:  # tarfile lets out what its parsers of numbers raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root: {path}: cannot be read as an uncompressed tar ({reason}): unpack or replace it"
        ) from error


def index_stream(file: IO[bytes], prefix: str, start: int, size: int, depth: int = 0) -> Iterator[Member]:
    """List the files in an open tar that begins at `start` of the outer one and has `size` bytes."""
    if depth > MOST_NESTED:
        raise tarfile.ReadError(f"{prefix} tars lie in each other, more than {MOST_NESTED} deep")
    with tarfile.open(fileobj=file, mode="r:") as tar:
        read = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
            if not read < member.offset_data <= member.offset_data + max(member.size, 0) <= size or member.size < 0:
                raise tarfile.ReadError(f"{member.name!r}: {member.size:,} bytes from {member.offset_data:,} on")
            if member.issparse():
                raise tarfile.ReadError(f"{member.name!r} is sparse")
            read = member.offset_data
            if not member.isfile() or is_hidden(member.name):
                continue
            if member.name.endswith(".tar"):
                inner = tar.extractfile(member)
                assert inner is not None
                folder, within = f"{prefix}{member.name.removesuffix('.tar')}/", start + member.offset_data
                yield from index_stream(inner, folder, within, member.size, depth + 1)
            else:
                yield Member(prefix + member.name, start + member.offset_data, member.size)


# ----------------------------------------------------------------------------------------------------------------------
# The index is kept: to read the headers of a million images takes minutes.


Labelled = tuple[TarSource, list[Label]]
Files = list[list[str | int]]  # name, size and time of each


def keep_index(folder: Path, part: str, paths: list[Path], build: Callable[[], Labelled]) -> Labelled:
    """What `build` finds in tar files, from the index that an earlier run has kept if they are the same files.

    It lies beside them, or where that cannot be written in the user's cache folder. Of the processes of a host one
    builds it, the others wait.

    Args:
        folder: The data set's folder.
        part: Which images these are, `train` or `val`, and what tells apart the labels that readers find.
        paths: The tar files in it; the same are those of the same names, sizes and times.
        build: Makes the index.
    """
    beside = folder / f".{part}.lkd-index"
    elsewhere = find_cache() / f"{hashlib.sha256(os.fsencode(beside.resolve())).hexdigest()}.index"
    with lock_folder(folder):
        try:
            found = [(path, path.stat()) for path in paths]
        except OSError:  # of which `build` says more
            return build()
        files: Files = [[str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns] for path, stat in found]
        for place in (beside, elsewhere):
            with suppress(UserError, *MALFORMED):  # there is none, or it is damaged
                return read_index(place, paths, files)
        started = time.monotonic()
        built = build()
        if time.monotonic() - started >= KEPT_FROM:
            for place in (beside, elsewhere):
                with suppress(UserError):
                    write_index(place, built, files)
                    break
    return built


def write_index(path: Path, labelled: Labelled, files: Files) -> None:
    """Write names, places and labels of images."""
    source, labels = labelled
    kinds = list(dict.fromkeys(labels))
    number = {label: position for position, label in enumerate(kinds)}
    names = "\0".join(source.names).encode(errors="surrogateescape")
    tensors = {
        "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        "places": source.places,
        "labels": torch.tensor([number[label] for label in labels]),
    }
    write_tensors(path, tensors, KIND, VERSION, {"files": files, "labels": kinds})


def read_index(path: Path, paths: list[Path], files: Files) -> Labelled:
    """Read what `write_index` wrote; raises ValueError if it is of other files."""
    tensors, header = read_tensors(path, KIND, VERSION)
    names = tensors["names"].numpy().tobytes().decode(errors="surrogateescape").split("\0")
    places, kinds = tensors["places"], header["labels"]
    tars, starts, sizes = places.unbind(1)
    ends = torch.tensor([size for _, size, _ in header["files"]])
    within = (tars >= 0) & (starts >= 0) & (sizes >= 0) & (starts + sizes <= ends[tars])
    if header["files"] != files or len(names) != len(places) or not bool(within.all()):
        raise ValueError(f"{path}: is of other files")
    return TarSource(paths, names, places), [kinds[label] for label in tensors["labels"].tolist()]
