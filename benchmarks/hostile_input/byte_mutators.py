"""Damage that knows no format: what disks, networks and blind fuzzers do to a file."""

import random
import struct

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Damage a file in one to four places.

    Args:
        rng: Where chance comes from.
        content: The file.
        other: Another file, to splice with.
    """
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        rng.choice(DAMAGES)(rng, damaged, other)
    return bytes(damaged)


def place(rng: random.Random, content: bytearray) -> int:
    """A random position; half of the time near the start, where headers are."""
    return rng.randrange(min(len(content), 512) if rng.random() < 0.5 else len(content)) if content else 0


def flip_bits(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Flip some bits."""
    for _ in range(rng.choice((1, 1, 8, 64)) if content else 0):
        content[place(rng, content)] ^= 1 << rng.randrange(8)


def write_number(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Write an integer that programs trip over."""
    width, start = rng.choice((1, 2, 4, 8)), place(rng, content)
    packed = struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS))
    content[start : start + width] = packed[:width] if rng.random() < 0.5 else packed[-width:]


def truncate(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Cut the end off."""
    del content[place(rng, content) :]


def insert(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Insert random bytes."""
    start = place(rng, content)
    content[start:start] = rng.randbytes(rng.choice((1, 3, 16, 1000)))


def delete(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Leave a part out."""
    start = place(rng, content)
    del content[start : start + rng.choice((1, 4, 100, 5000))]


def repeat(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Repeat a part."""
    start = place(rng, content)
    part = content[start : start + rng.choice((1, 8, 512))]
    content[start:start] = part * rng.choice((1, 2, 50))


def blank(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Overwrite a part with zeros or ones."""
    start, length = place(rng, content), rng.choice((1, 8, 512))
    content[start : start + length] = rng.choice((b"\0", b"\xff")) * len(content[start : start + length])


def splice(rng: random.Random, content: bytearray, other: bytes) -> None:
    """Go on as another file does."""
    content[place(rng, content) :] = other[place(rng, bytearray(other)) :]


DAMAGES = (flip_bits, flip_bits, write_number, write_number, truncate, insert, delete, repeat, blank, splice)
