"""IDX files (MNIST's) whose headers lie."""

import random
import struct

SIZES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 60_000, 28)


def mutate_idx(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Another type, number of dimensions, or size."""
    magic = struct.pack(
        ">BBBB", rng.choice((0, 0, 1)), 0, rng.choice((8, 9, 11, 12, 13, 14, 7)), rng.choice((0, 1, 3, 4, 255))
    )
    sizes = b"".join(struct.pack(">I", rng.choice(SIZES)) for _ in range(rng.choice((1, 3))))
    return rng.choice(
        (magic + content[4:], content[:4] + sizes + content[4 + len(sizes) :], magic + sizes + content[16:])
    )
