"""Images whose headers lie about their size."""

import random
import struct
import zlib

SIDES = (0, 1, 2, 255, 4096, 16_000, 30_000, 65_500, 65_535, 10**6, 2**31 - 1)


def mutate_image(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Write other dimensions into an image's header."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    if content.startswith(b"\x89PNG"):
        head = b"IHDR" + struct.pack(">II", width, height) + change_depth(rng, content[24:29])
        return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
    if content.startswith(b"\xff\xd8"):
        start = next((at for at in range(2, len(content) - 9) if content[at : at + 2] in (b"\xff\xc0", b"\xff\xc2")), 0)
        if start:
            sides = struct.pack(">HH", height % 65_536, width % 65_536)
            return content[: start + 5] + sides + content[start + 9 :]
    if content.startswith(b"GIF8"):
        return content[:6] + struct.pack("<HH", width % 65_536, height % 65_536) + content[10:]
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", width, rng.choice((height, -height))) + content[26:]
    return content[:20] + struct.pack("<HH", width % 65_536, height % 65_536) + content[24:]


def change_depth(rng: random.Random, rest: bytes) -> bytes:
    """The rest of an IHDR, now and then with another depth and colour type."""
    return rest if rng.random() < 0.7 else bytes([rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6)), *rest[2:]])
