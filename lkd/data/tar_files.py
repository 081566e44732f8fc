"""Images in tar files, found by their offsets: any of them can be read at any time, as from files of their own."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lkd.data.decoding import DamagedImageError, decode
from lkd.errors import UserError
from lkd.files import MALFORMED

MOST_NESTED = 3  # tars in tars
SMALL = 1 << 16  # bytes of the largest member that is read while a tar is indexed: a label


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


class TarSource:
    """Images in tar files.

    Args:
        paths: The tar files.
        members: Of each image, the position of its tar file, and where it is there.
    """

    def __init__(self, paths: list[Path], members: list[tuple[int, Member]]) -> None:
        self.paths = [str(path) for path in paths]
        self.names = [member.name for _, member in members]
        self.places = torch.tensor([(tar, member.start, member.size) for tar, member in members]).view(-1, 3)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, position: int) -> Tensor:
        """Decode a member; see `ImageSource`."""
        tar, start, size = self.places[position].tolist()
        try:
            content = np.fromfile(self.paths[tar], np.uint8, size, offset=start)
        except OSError as error:
            raise DamagedImageError(f"{self.name(position)}: cannot be read ({error.strerror})") from error
        return decode(torch.from_numpy(content), self.name(position))

    def name(self, position: int) -> str:
        """The tar file's name and the member's."""
        return f"{Path(self.paths[self.places[position, 0]]).name}/{self.names[position]}"

    def size(self, position: int) -> int:
        """Bytes of the member."""
        return int(self.places[position, 2])


def index_tar(path: Path) -> Iterator[Member]:
    """List the files in a tar file, those of tars in it too; only headers are read.

    Raises:
        UserError: If it is compressed, damaged or cut off.
    """
    try:
        with path.open("rb") as file:
            yield from index_stream(file, "", 0, path.stat().st_size)
    except (tarfile.TarError, OSError, *MALFORMED) as error:  # tarfile lets out what its parsers of numbers raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root: {path}: cannot be read as an uncompressed tar ({reason}): unpack or replace it"
        ) from error


def index_stream(file: IO[bytes], prefix: str, start: int, size: int, depth: int = 0) -> Iterator[Member]:
    """List the files in an open tar that begins at `start` of the outer one and has `size` bytes.

    Raises:
        tarfile.ReadError: If a member is not within the tar, or tars lie in each other more than `MOST_NESTED` deep.
    """
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
            if not member.isfile():
                continue
            if member.name.endswith(".tar"):
                inner = tar.extractfile(member)
                assert inner is not None
                folder, within = f"{prefix}{member.name.removesuffix('.tar')}/", start + member.offset_data
                yield from index_stream(inner, folder, within, member.size, depth + 1)
            else:
                yield Member(prefix + member.name, start + member.offset_data, member.size)


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of a small member."""
    return np.fromfile(path, np.uint8, min(member.size, SMALL), offset=member.start).tobytes()
