"""The house as its imports draw it: which room may import which, and which arrow is wrong."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]

# Room → the rooms that it may import, besides itself. `meta` is the engine; "lkd" is the package's own __init__.
BELOW_DATA = {"core"}
BELOW_MODELS = BELOW_DATA | {"data"}
BELOW_WEIGHTS = BELOW_MODELS | {"models", "losses"}
BELOW_TRAINING = BELOW_WEIGHTS | {"balance", "influence", "tracking", "config"}
BELOW_POOL = BELOW_TRAINING | {"training"}
BELOW_META_TRAINING = BELOW_POOL | {"pool", "meta"}
BELOW_EVALUATION = BELOW_META_TRAINING | {"meta_training", "export"}
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "tracking": {"core", "config"},
    "data": BELOW_DATA,
    "models": BELOW_MODELS,
    "losses": BELOW_MODELS,
    "balance": BELOW_WEIGHTS,
    "influence": BELOW_WEIGHTS | {"config", "meta"},  # its settings are a part of recipes
    "training": BELOW_TRAINING,
    "pool": BELOW_POOL | {"meta"},
    "meta_training": BELOW_META_TRAINING,
    "export": BELOW_POOL,
    "evaluation": BELOW_EVALUATION,
    "commands": BELOW_EVALUATION | {"evaluation"},
    "api": BELOW_EVALUATION,
    "cli": {"core", "config", "commands"},
    "__init__": set(BELOW_EVALUATION) | {"api"},
    "meta": set(),
}


def list_files() -> dict[str, Path]:
    """Module → file, of `lkd` and `meta`."""
    found = {}
    for package in ("lkd", "meta"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def list_imports(path: Path, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules of the house that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inner]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in modules)


def find_room(module: str) -> str:
    """The room that a module stands in."""
    parts = module.split(".")
    return parts[0] if parts[0] == "meta" else parts[1] if len(parts) > 1 else "__init__"


def find_wrong_arrows() -> list[str]:
    """Each import that the house does not allow, as `file:line imports module`."""
    modules = list_files()
    wrong = []
    for module, path in modules.items():
        for target, line in list_imports(path, modules):
            room, other = find_room(module), find_room(target)
            if other not in (room, "__init__") and other not in ARROWS.get(room, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}: {room} may not import {other}")
    return wrong


def find_circles() -> list[list[str]]:
    """Files that import each other, directly or by way of others; circles that share an import count as one."""
    modules = list_files()
    graph = {name: {target for target, _ in list_imports(path, modules)} - {name} for name, path in modules.items()}
    circles = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as circle:
            circles.append(circle.args[1])  # a file is imported by the next one
            graph[circles[-1][1]].discard(circles[-1][0])
        else:
            return circles


def list_files_of_a_step() -> list[str]:
    """The files of `lkd` that a step of `lkd distill` enters, with KD on embedded images, once it has warmed up."""
    import torch

    from lkd.config import DataRecipe, DistillRecipe
    from lkd.training.answers import prepare_teacher
    from lkd.training.build import build
    from lkd.training.distill import start_training

    data = DataRecipe(train_size=200, meta_validation_size=100)
    recipe, device = DistillRecipe(data=data, loss="kd"), torch.device("cpu")
    parts = build(recipe)
    teacher = prepare_teacher(parts.teacher, parts.images, device, parts.loss.teacher_stages)
    training = start_training(parts.student, parts.images, parts.loss, teacher, recipe.train, recipe.seed, device)
    for _ in range(2):
        training.run_step()
    entered: set[str] = set()
    package = str(ROOT / "lkd")

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            entered.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        training.run_step()
    finally:
        sys.setprofile(None)
    return sorted(entered)


if __name__ == "__main__":
    print(*find_wrong_arrows(), *find_circles(), sep="\n")
