"""What damages a file: blindly, or by lies in the terms of its format. Each is a function of random numbers alone."""

import copy
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from benchmarks.photographs import add_member
from lkd.core.files import MALFORMED
from lkd.core.tensor_files import DIGEST_KEY, HEADER_KEY, hash_content

# ----------------------------------------------------------------------------------------------------------------------
# Bytes: what disks, networks and blind fuzzers do.

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
DAMAGES = ("flip", "flip", "number", "number", "cut", "insert", "delete", "repeat", "blank", "splice")


def mutate_bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Damage a file in one to four places; half of them near the start, where headers are."""
    damaged = bytearray(content)

    def place(within: bytes | bytearray) -> int:
        return rng.randrange(min(len(within), 512) if rng.random() < 0.5 else len(within)) if within else 0

    for _ in range(rng.randint(1, 4)):
        kind, start = rng.choice(DAMAGES), place(damaged)
        if kind == "flip":
            for _ in range(rng.choice((1, 1, 8, 64)) if damaged else 0):
                damaged[place(damaged)] ^= 1 << rng.randrange(8)
        elif kind == "number":  # that programs trip over
            width, packed = rng.choice((1, 2, 4, 8)), struct.pack(rng.choice("<>") + "Q", rng.choice(NUMBERS))
            damaged[start : start + width] = packed[:width] if rng.random() < 0.5 else packed[-width:]
        elif kind == "cut":
            del damaged[start:]
        elif kind == "insert":
            damaged[start:start] = rng.randbytes(rng.choice((1, 3, 16, 1000)))
        elif kind == "delete":
            del damaged[start : start + rng.choice((1, 4, 100, 5000))]
        elif kind == "repeat":
            damaged[start:start] = damaged[start : start + rng.choice((1, 8, 512))] * rng.choice((1, 2, 50))
        elif kind == "blank":
            length = len(damaged[start : start + rng.choice((1, 8, 512))])
            damaged[start : start + length] = rng.choice((b"\0", b"\xff")) * length
        else:
            damaged[start:] = other[place(other) :]
    return bytes(damaged)


# ----------------------------------------------------------------------------------------------------------------------
# JSON: values of other types, numbers out of range, paths, deep nests.

NEST = "NEST-OF-LISTS-"  # what is replaced by a nest that json.dumps would refuse to write
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 10**5, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "x" * 100_000, "../../../etc/passwd", "/etc/passwd", "\x1b[2J", "\ud800"),
    *("1", "small_cnn", "resnet50", "hf-hub:someone/model", "os.system", [], {}, [[]], [0], [{}], {"a": {}}),
    *([1, 2, 3], [-1, -1], [2**40, 2**40], [0, float("nan")], {"class_path": "os.system"}, f"{NEST}100"),
    *(f"{NEST}5000", f"{NEST}100000", {"name": "vit_tiny_patch16_224", "num_classes": 10}),
    *({"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"depth": 10**6}, {"embed_dim": 10**6}),
)


def mutate_json(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to three of its places changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        tree = change_place(rng, tree)
    return tree


def change_place(rng: random.Random, tree: Any) -> Any:
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(VALUES))  # what is changed later must not change the next file
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.6:
        tree[key] = change_place(rng, tree[key])
    elif kind < 0.7:
        del tree[key]
    elif kind < 0.8:
        tree[key] = json.loads(json.dumps(tree[rng.choice(keys)]))  # a copy: no circles
    elif isinstance(tree, dict):
        tree[rng.choice(("", "a.b", "class", "pretrained", "options", "x" * 1000, key + "x"))] = copy.deepcopy(
            rng.choice(VALUES)
        )
    else:
        tree.extend([rng.choice([tree[key], copy.deepcopy(rng.choice(VALUES))])] * rng.choice((1, 2, 1000)))
    return tree


def write_json_text(tree: Any) -> str:
    """Serialise a tree, with the nests that stand for themselves."""
    text = json.dumps(tree)
    for depth in (100, 5000, 100_000):
        text = text.replace(f'"{NEST}{depth}"', "[" * depth + "]" * depth)
    return text


def mutate_json_file(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Change a JSON file, or a random line of a file of JSON lines."""
    lines = [content.decode()]
    try:
        json.loads(lines[0])
    except ValueError:
        lines = lines[0].splitlines()
    number = rng.randrange(len(lines))
    lines[number] = write_json_text(mutate_json(rng, json.loads(lines[number])))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors: lengths, offsets, shapes and dtypes that lie, and metadata of other types.

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", "")
LENGTHS = (0, 1, 7, 10**6, 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
SIZES = (0, 1, -1, 2, 3, 2**31, 2**32, 2**63, 2**64, 10**30, 1.5, "3", None)
CASTS = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def mutate_safetensors(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Rewrite the length, the header, what our own header says, or the tensors; mostly with a hash that fits."""
    change = rng.choice((lie_about_length, change_header, change_own_header, change_own_header, change_tensors))
    changed = change(rng, content)
    return sign(changed) if rng.random() < 0.9 else changed


def sign(content: bytes) -> bytes:
    """The file with the hash of its content, as whoever means harm would write it; if there is no such, as it is."""
    try:
        header, data = split(content)
        own = json.loads(header["__metadata__"][HEADER_KEY])
        own.pop(DIGEST_KEY, None)
        own[DIGEST_KEY] = hash_content(json.dumps(own), load(content))
        header["__metadata__"][HEADER_KEY] = json.dumps(own)
        return join(json.dumps(header), data)
    except (*MALFORMED, SafetensorError, RecursionError, struct.error):
        return content


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: str, data: bytes) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


def lie_about_length(rng: random.Random, content: bytes) -> bytes:
    true = struct.unpack("<Q", content[:8])[0]
    lie = rng.choice((*LENGTHS, true - 1, true + 1, len(content), len(content) - 8, len(content) - 9))
    return struct.pack("<Q", lie % 2**64) + content[8:]


def change_header(rng: random.Random, content: bytes) -> bytes:
    """Lie about one tensor, or break the header's form."""
    header, data = split(content)
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(("dtype", "shape", "offsets", "any", "any"))
    if kind == "any" or not names:
        return join(write_json_text(mutate_json(rng, header)), data)
    entry = header[rng.choice(names)]
    if kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        entry["shape"] = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 2, 4, 70)))]
    else:
        begin, end = entry["data_offsets"]
        lies = (0, -1, begin, end, begin - 1, end + 1, len(data), len(data) + 1, 2**63, 2**64 - 1)
        entry["data_offsets"] = [rng.choice(lies), rng.choice(lies)]
    return join(json.dumps(header), data)


def change_own_header(rng: random.Random, content: bytes) -> bytes:
    """Change what the package itself wrote into the header."""
    header, data = split(content)
    own = json.loads(header["__metadata__"][HEADER_KEY])
    kept = {key: own[key] for key in ("kind", "format_version")} if rng.random() < 0.9 else {}
    changed = mutate_json(rng, {key: value for key, value in own.items() if key not in kept})
    header["__metadata__"][HEADER_KEY] = write_json_text(changed | kept if isinstance(changed, dict) else changed)
    return join(json.dumps(header), data)


def change_tensors(rng: random.Random, content: bytes) -> bytes:
    """Other tensors than the header promises: consistent as safetensors, not as what the file is."""
    metadata, tensors = split(content)[0].get("__metadata__", {}), load(content)
    for _ in range(rng.randint(1, 2)):
        if tensors:
            name = rng.choice(sorted(tensors))
            tensors |= change_tensor(rng, name, tensors.pop(name))
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def change_tensor(rng: random.Random, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What takes a tensor's place: nothing, another of its name, or itself under another name."""
    number = rng.choice([value for value in VALUES if isinstance(value, float)])
    changes = (
        lambda: {},
        lambda: {rng.choice(("x", "", "a:b", "parameters:x", "a.b.c", name + "x", "../x")): tensor},
        lambda: {name: tensor.to(rng.choice(CASTS))},
        lambda: {name: tensor.flatten()},
        lambda: {name: tensor.flatten()[: tensor.numel() // 2]},
        lambda: {name: tensor.new_empty(rng.choice(((0,), (0, 5), (3, 0))))},
        lambda: {name: torch.full_like(tensor.double(), number).to(tensor.dtype)},
        lambda: {name: -tensor if tensor.dtype != torch.bool else ~tensor},
        lambda: {name: tensor.new_ones(())},
        lambda: {name: tensor.unsqueeze(0).repeat(2, *[1] * tensor.dim())},
    )
    return {name: value.clone() for name, value in rng.choice(changes)().items()}


# ----------------------------------------------------------------------------------------------------------------------
# Tar files: headers that lie, hostile names, links, nests.

NAMES = ("../../evil.jpg", "/tmp/evil.jpg", "c/\0x.jpg", "", ".", "..", "a" * 300 + ".jpg", "x.tar", "c/0.cls")
NAMES += ("\udcff.jpg",)
FIELDS = {"name": (0, 100), "size": (124, 12), "typeflag": (156, 1), "linkname": (157, 100), "magic": (257, 8)}
FIELDS |= {"devmajor": (329, 8), "prefix": (345, 155), "whole": (0, 512)}
TYPES = b"01234567gxLKSDVNM\0"
BODIES = (b"", b"999999999999", b"-1", b"[" * 5000, b'{"label": 1e9}', b"7" * 5000)


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
            values = [octal, (b"\xff" if number < 0 else b"\x80") + (number % 2**88).to_bytes(11, "big")]
        if name == "typeflag":
            values = [bytes([rng.choice(TYPES)])]
        changed[start + offset : start + offset + width] = rng.choice(values)[:width].ljust(width, b"\0")
        changed[start : start + 512] = fit_checksum(changed[start : start + 512])
    return bytes(changed)


def fit_checksum(header: bytes | bytearray) -> bytes:
    """A tar header with the checksum that belongs to it."""
    total = sum(header[:148] + b" " * 8 + header[156:])
    return bytes(header[:148] + f"{total:06o}".encode() + b"\0 " + header[156:])


def nest_tars(depth: int) -> bytes:
    """A tar in a tar in a tar."""
    content = b""
    for _ in range(depth):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            add_member(tar, "n.tar", content)
        content = buffer.getvalue()
    return content


def add_members(rng: random.Random, content: bytes) -> bytes:
    """A tar with hostile members before those of the valid one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(NAMES) or "e"
            member = tarfile.TarInfo(rng.choice((name, f"c/{name}", "0000.cls", "c/0.json")).replace("\0", "0"))
            member.type = rng.choice((b"0", b"2", b"1", b"3", b"5"))  # file, links, device, folder
            member.linkname = rng.choice(("/etc/passwd", "../../evil", member.name))
            body = rng.choice((*BODIES, content[:20_000])) if member.type == tarfile.REGTYPE else b""
            if tar.format == tarfile.PAX_FORMAT and rng.random() < 0.5:
                key = rng.choice(("size", "path", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "mtime"))
                member.pax_headers = {key: rng.choice(("-1", "0", "99999999999999", "x", "1,2,3", "../../evil", "nan"))}
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        if rng.random() < 0.2:
            add_member(tar, "nest.tar", nest_tars(rng.choice((2, 5, 40))))
    return buffer.getvalue()[:-1024] + content


# ----------------------------------------------------------------------------------------------------------------------
# Pickles and the zip files that torch.save makes of them.


class Payload:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch EVIL",)


LARGE = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"  # a number in a pickle
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
    """Change, swap, rename, bloat, drop or double a member; or a pickle in the whole file's place."""
    if rng.random() < 0.1:
        return rng.choice(PICKLES)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = rng.randrange(len(members))
    name, body = members[number]
    changes = (
        lambda: [(name, mutate_bytes(rng, body, other))],
        lambda: [(name, rng.choice(PICKLES))],
        lambda: [(name, rng.choice(members)[1])],
        lambda: [(rng.choice(("../../evil", "/tmp/evil", name + "x")), body)],
        lambda: [(name, body[: rng.choice((0, 200))] + bytes(rng.choice((10**3, 10**7, 10**8))))],
        lambda: [(name, body.replace(b"K\x03", b"J\xff\xff\xff\x7f").replace(b"K\x10", LARGE, 3))],
        lambda: [],
        lambda: [(name, body), (name, body)],
    )
    members[number : number + 1] = rng.choice(changes)()
    buffer = io.BytesIO()
    bloated = any(len(body) > 10**7 for _, body in members)
    method = zipfile.ZIP_DEFLATED if bloated or rng.random() < 0.5 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body, method)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Images and IDX files whose headers lie about their size.

SIDES = (0, 1, 2, 255, 4096, 16_000, 30_000, 65_500, 65_535, 10**6, 2**31 - 1)
IDX_SIZES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 60_000, 28)


def mutate_image(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Write other dimensions into an image's header, in a PNG now and then another depth and colour type."""
    content, sides = bytearray(content), (rng.choice(SIDES), rng.choice(SIDES))
    if content.startswith(b"\x89PNG") and rng.random() < 0.3:
        content[24:26] = rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6))
    return claim_size(bytes(content), *sides, rng.choice((1, -1)))


def claim_size(content: bytes, width: int, height: int, sign: int = 1) -> bytes:
    """An image that claims a size; the height of a BMP has a sign."""
    low, high = width % 65_536, height % 65_536
    if content.startswith(b"\x89PNG"):
        head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
    if content.startswith(b"\xff\xd8"):
        found = (at for at in range(2, len(content) - 9) if content[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
        start = next(found, 0)
        return content[: start + 5] + struct.pack(">HH", high, low) + content[start + 9 :] if start else content
    if content.startswith(b"BM"):
        return content[:18] + struct.pack("<ii", width, sign * height) + content[26:]
    start = 6 if content.startswith(b"GIF8") else 20
    return content[:start] + struct.pack("<HH", low, high) + content[start + 4 :]


def mutate_idx(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Another type, number of dimensions, or size."""
    kinds = rng.choice((0, 0, 1)), 0, rng.choice((8, 9, 11, 12, 13, 14, 7)), rng.choice((0, 1, 3, 4, 255))
    magic, sizes = bytes(kinds), b"".join(struct.pack(">I", rng.choice(IDX_SIZES)) for _ in range(rng.choice((1, 3))))
    damaged = magic + content[4:], content[:4] + sizes + content[4 + len(sizes) :], magic + sizes + content[16:]
    return rng.choice(damaged)


# ----------------------------------------------------------------------------------------------------------------------
# YAML: tags that build objects, bombs of aliases and merges, nests, imports by name.

IMPORT = "{class_path: evil_module.Evil, init_args: {}}"
FRAGMENTS = (
    *("!!python/object/apply:os.system ['touch EVIL']", "!!python/object/new:os.system [touch EVIL]"),
    *("!!python/name:os.system", "!!python/module:evil_module", "!!binary aGVsbG8=", "!!timestamp 2001-12-14"),
    *("!!set {a, b}", "!<tag:yaml.org,2002:python/object/apply:os.system> [x]", IMPORT, f"[{IMPORT}]", f"'{IMPORT}'"),
    *(f"{{name: kd, weight: [{IMPORT}]}}", "evil_module.Evil", "null", "~", "-1", "1e999", ".nan", "0x" + "f" * 400),
    *("9" * 10_000, "1:59:59:59:59", "2001-99-99", "{}", "[]", "[1, 2, 3]", "{a: b}", "*undefined", "&a [*a]"),
    *("'\\ud800'", '"\\ud800\\0"', "../../../etc/passwd", "/dev/zero", "/etc/passwd", "${HOME}", "$(touch EVIL)"),
    *("; touch EVIL", "[" * 300 + "]" * 300, "[" * 50_000, "{a: " * 500 + "1" + "}" * 500, "x" * 200_000),
)
ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGE_BOMB = "m0: &m0 {x: 1, y: 2}\n" + "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
LINES = (
    *(ALIAS_BOMB, MERGE_BOMB, "base: recipe.yaml", "base: ../../../etc/passwd", "base: 3", "config: recipe.yaml"),
    *("base: [/dev/null, /proc/self/environ]", "__path__: x", "class_path: evil_module.Evil", "init_args: {}"),
    *("print_config: true", "data.name: embedded", "? [a, b]\n: c", "? {a: b}\n: c", "1: 2", "null: 1"),
    "--- {}\n--- {}",
    *("%YAML 9.9\n---", "\t\tx: 1", "\0: 1", "\ufeffx: 1", "- 1"),
)


def mutate_yaml(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Change values, lines and the order of lines."""
    lines = content.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        number, kind = rng.randrange(len(lines)), rng.random()
        if kind < 0.5:
            key, colon, _ = lines[number].partition(":")
            lines[number] = f"{key}{colon or ':'} {rng.choice(FRAGMENTS)}"
        elif kind < 0.8:
            lines.insert(rng.choice((0, number, len(lines))), rng.choice(LINES))
        elif kind < 0.9:
            lines.insert(number, lines[rng.randrange(len(lines))])
        else:
            lines[number] = lines[number].replace(" ", rng.choice(("", "  ", "\t", "\u2028")), 2)
    return "\n".join(lines).encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "latin-1")), "replace")
