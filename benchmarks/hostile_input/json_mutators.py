"""JSON that means harm: values of other types, numbers out of range, paths, deep nests."""

import copy
import json
import random
from typing import Any

NEST = "NEST-OF-LISTS-"  # what is replaced by a nest that json.dumps would refuse to write
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 10**5, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "x" * 100_000, "../../../etc/passwd", "/etc/passwd", "\x1b[2J", "\ud800"),
    *("1", "small_cnn", "resnet50", "hf-hub:someone/model", "os.system", [], {}, [[]], [0], [{}], {"a": {}}),
    *([1, 2, 3], [-1, -1], [2**40, 2**40], [0, float("nan")], {"class_path": "os.system"}, f"{NEST}100"),
    *(f"{NEST}5000", f"{NEST}100000", {"name": "vit_tiny_patch16_224", "num_classes": 10}),
    *({"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"depth": 10**6}, {"embed_dim": 10**6}),
)


def draw_value(rng: random.Random) -> Any:
    """One of them, of its own: what is changed later must not change the next file."""
    return copy.deepcopy(rng.choice(VALUES))


def mutate_json(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to three of its places changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        tree = change(rng, tree)
    return tree


def change(rng: random.Random, tree: Any) -> Any:
    """Change one place of a tree."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return draw_value(rng)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    kind = rng.random()
    if kind < 0.6:
        tree[key] = change(rng, tree[key])
    elif kind < 0.7:
        del tree[key]
    elif kind < 0.8:
        tree[key] = json.loads(json.dumps(tree[rng.choice(keys)]))  # a copy: no circles
    elif isinstance(tree, dict):
        tree[rng.choice(("", "a.b", "class", "pretrained", "options", "x" * 1000, key + "x"))] = draw_value(rng)
    else:
        tree.extend([rng.choice([tree[key], draw_value(rng)])] * rng.choice((1, 2, 1000)))
    return tree


def write_json_text(tree: Any) -> str:
    """Serialise a tree, with the nests that stand for themselves."""
    text = json.dumps(tree)
    for depth in (100, 5000, 100_000):
        text = text.replace(f'"{NEST}{depth}"', "[" * depth + "]" * depth)
    return text


def mutate_json_file(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Change a JSON file, or a random line of a file of JSON lines."""
    try:
        return write_json_text(mutate_json(rng, json.loads(content))).encode("utf-8", "surrogatepass")
    except ValueError:
        lines = content.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = write_json_text(mutate_json(rng, json.loads(lines[number])))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
