"""Tar, zip and pickle files that mean harm."""

import io
import os
import pickle
import random
import struct
import tarfile
import zipfile

NAMES = (
    "../../evil.jpg",
    "/tmp/evil.jpg",
    "c/\0x.jpg",
    "",
    ".",
    "..",
    "a" * 300 + ".jpg",
    "x.tar",
    "c/0.cls",
    "\udcff.jpg",
)
FIELDS = {"name": (0, 100), "size": (124, 12), "typeflag": (156, 1), "linkname": (157, 100), "magic": (257, 8)}
FIELDS |= {"devmajor": (329, 8), "prefix": (345, 155), "whole": (0, 512)}
TYPES = b"01234567gxLKSDVNM\0"


def mutate_tar(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Lie in a member's header, whose checksum is made to fit, or put hostile members in."""
    return change_tar_header(rng, content) if rng.random() < 0.6 else add_members(rng, content)


def change_tar_header(rng: random.Random, content: bytes) -> bytes:
    """Change a field of one or two headers."""
    changed = bytearray(content)
    starts = [start for start in range(0, len(changed) - 511, 512) if changed[start + 257 : start + 262] == b"ustar"]
    for start in rng.sample(starts, min(len(starts), rng.randint(1, 2))):
        name, (offset, width) = rng.choice(sorted(FIELDS.items()))
        number = rng.choice((-1, -512, -1024, -(2**40), 0, 1, 511, 2**33, 2**62, 2**63 - 1))
        octal = f"{number % 8**11:011o}".encode() + b"\0"
        values = [rng.randbytes(width), rng.choice(NAMES).encode("utf-8", "surrogateescape"), octal, bytes(width)]
        if name == "size":
            values = [octal, (b"\xff" if number < 0 else b"\x80") + (number % 2**88).to_bytes(11, "big"), *values]
        if name == "typeflag":
            values = [bytes([rng.choice(TYPES)])]
        value = rng.choice(values[:2] if name == "size" else values)[:width]
        changed[start + offset : start + offset + width] = value.ljust(width, b"\0")
        block = changed[start : start + 148] + b" " * 8 + changed[start + 156 : start + 512]
        changed[start + 148 : start + 156] = f"{sum(block):06o}".encode() + b"\0 "
    return bytes(changed)


def add_members(rng: random.Random, content: bytes) -> bytes:
    """A tar with hostile members before those of the valid one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(NAMES) or "e"
            member = tarfile.TarInfo(rng.choice((name, f"c/{name}", "0000.cls", "c/0.json")).replace("\0", "0"))
            member.type = rng.choice(
                (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
            )
            member.linkname = rng.choice(("/etc/passwd", "../../evil", member.name))
            body = rng.choice(
                (b"", b"999999999999", b"-1", b"[" * 5000, b'{"label": 1e9}', b"7" * 5000, content[:20_000])
            )
            if tar.format == tarfile.PAX_FORMAT and rng.random() < 0.5:
                key = rng.choice(("size", "path", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "mtime"))
                member.pax_headers = {key: rng.choice(("-1", "0", "99999999999999", "x", "1,2,3", "../../evil", "nan"))}
            if member.type == tarfile.REGTYPE:
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
            else:
                tar.addfile(member)
        if rng.random() < 0.2:
            nest = b""
            for _ in range(rng.choice((2, 5, 40))):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as nested:
                    member = tarfile.TarInfo("n.tar")
                    member.size = len(nest)
                    nested.addfile(member, io.BytesIO(nest))
                nest = inner.getvalue()
            member = tarfile.TarInfo("nest.tar")
            member.size = len(nest)
            tar.addfile(member, io.BytesIO(nest))
    return buffer.getvalue()[:-1024] + content


class Payload:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch EVIL",)


PICKLES = (
    pickle.dumps(Payload()),
    pickle.dumps(Payload(), 0),
    pickle.dumps({"model": Payload()}, 2),
    b"cos\nsystem\n(S'touch EVIL'\ntR.",
    b"\x80\x02" + b"(" * 10_000 + b".",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
    b"\x80\x02]" + b"]a" * 50_000 + b".",
    b"\x80\x02K\x01\x94" * 100 + b".",
    b"\x80\x02}q\x00.",
    b"\x80\x02Jn\x00\x00\x00r\xff\xff\xff\xff.",
    b".",
    b"",
)


def mutate_zip(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Change, swap, bloat, drop or replace members of a zip file (npz, torch.save), or lie in its directory."""
    if rng.random() < 0.1:
        return rng.choice(PICKLES)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number, kind = rng.randrange(len(members)), rng.random()
    name, body = members[number]
    if kind < 0.3:
        damaged = bytearray(body)
        for _ in range(rng.choice((1, 2, 10)) if body else 0):
            damaged[rng.randrange(min(len(body), 2000))] = rng.randrange(256)
        members[number] = name, bytes(damaged)
    elif kind < 0.45:
        members[number] = name, rng.choice(PICKLES)
    elif kind < 0.55:
        members[number] = name, members[rng.randrange(len(members))][1]
    elif kind < 0.65:
        members[number] = rng.choice(("../../evil", "/tmp/evil", "x.npy", name + "x", "a" * 70_000)[:4]), body
    elif kind < 0.75:
        members[number] = (
            name,
            (body[:200] if rng.random() < 0.5 else b"") + bytes(rng.choice((10**3, 10**7, 10**8))),
        )
    elif kind < 0.85:
        members[number] = name, change_npy_header(rng, body)
    elif kind < 0.95:
        del members[number]
    else:
        members.append((name, body))
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.5 or len(members[min(number, len(members) - 1)][1]) > 10**7 else 0
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body, method)
    return buffer.getvalue()


def change_npy_header(rng: random.Random, body: bytes) -> bytes:
    """A lie in the header of an array, if it is one; else numbers of a pickle changed."""
    if not body.startswith(b"\x93NUMPY"):
        return body.replace(b"K\x03", b"J\xff\xff\xff\x7f").replace(b"K\x10", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", 3)
    descr = rng.choice(
        ("'|O'", "'|u1'", "'<f8'", "'|S1000000000'", "[('a', '|O')]", "'" + "x" * 5000 + "'", "('|V9', (9,)*9)")
    )
    shape = rng.choice(
        ("()", "(0,)", "(-1,)", "(10**30,)", "(4000000000, 4000000000)", "(" * 3000, "(99999999999,)", "(1,)*99")
    )
    header = f"{{'descr': {descr}, 'fortran_order': {rng.choice(('False', 'True', '1'))}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + body[128:]
