"""Safetensors files that mean harm: lengths, offsets, shapes and dtypes that lie, and metadata of other types."""

import json
import random
import struct
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from benchmarks.hostile_input.json_mutators import VALUES, mutate_json, write_json_text
from lkd.core.files import MALFORMED
from lkd.core.tensor_files import DIGEST_KEY, HEADER_KEY, hash_content

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
    """A file with a header of any text."""
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data


def lie_about_length(rng: random.Random, content: bytes) -> bytes:
    """Another header length than the header's."""
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
    whole = changed | kept if isinstance(changed, dict) else changed
    header["__metadata__"][HEADER_KEY] = write_json_text(whole)
    return join(json.dumps(header), data)


def change_tensors(rng: random.Random, content: bytes) -> bytes:
    """Other tensors than the header promises: consistent as safetensors, not as what the file is."""
    metadata, tensors = split(content)[0].get("__metadata__", {}), load(content)
    for _ in range(rng.randint(1, 2)):
        if not tensors:
            break
        name = rng.choice(sorted(tensors))
        tensors |= change_tensor(rng, name, tensors.pop(name))
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def change_tensor(rng: random.Random, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What takes a tensor's place: nothing, another of its name, or itself under another name."""
    kind = rng.choice(("drop", "rename", "cast", "flatten", "shorten", "empty", "fill", "negate", "scalar", "wide"))
    if kind == "drop":
        return {}
    if kind == "rename":
        return {rng.choice(("x", "", "a:b", "parameters:x", "a.b.c", name + "x", "../x")): tensor}
    numbers = {"fill": rng.choice([v for v in VALUES if isinstance(v, float)]), "scalar": 1.0}
    changed = {
        "cast": lambda: tensor.to(rng.choice(CASTS)),
        "flatten": lambda: tensor.flatten(),
        "shorten": lambda: tensor.flatten()[: tensor.numel() // 2],
        "empty": lambda: tensor.new_empty(rng.choice(((0,), (0, 5), (3, 0)))),
        "fill": lambda: torch.full_like(tensor.double(), numbers["fill"]).to(tensor.dtype),
        "negate": lambda: -tensor if tensor.dtype != torch.bool else ~tensor,
        "scalar": lambda: tensor.new_ones(()),
        "wide": lambda: tensor.unsqueeze(0).repeat(2, *[1] * tensor.dim()),
    }[kind]()
    return {name: changed.clone()}
