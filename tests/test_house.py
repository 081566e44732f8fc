"""The rooms and their arrows are as CONTRIBUTING draws them."""

import ast
import importlib
import re
from pathlib import Path

from tests.house import find_circles, find_wrong_arrows, list_files_of_a_step

ROOT = Path(__file__).parents[1]


def test_every_arrow_is_one_that_the_house_allows() -> None:
    assert not find_wrong_arrows(), "\n".join(find_wrong_arrows())


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert not find_circles()


def test_a_step_of_distill_passes_through_at_most_ten_files() -> None:
    assert len(list_files_of_a_step()) <= 10, list_files_of_a_step()


def test_the_package_leaves_the_callers_matplotlib_as_it_is() -> None:
    """In a notebook another backend would show no picture any more."""
    global_words = re.compile(r"pyplot|matplotlib\.use|rcParams")
    files = [*(ROOT / "lkd").rglob("*.py"), *(ROOT / "meta").rglob("*.py")]
    assert not [path for path in files if global_words.search(path.read_text().replace("without pyplot", ""))]


def test_what_the_benchmarks_import_is_there() -> None:
    """They run for minutes to hours, so that no test runs them all."""
    folder = ROOT / "benchmarks"
    missing = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            beside = [each / f"{node.module.removeprefix('benchmarks.')}.py" for each in (path.parent, folder)]
            own = next((each for each in beside if each.exists()), None)
            if own:
                known = list_names(own)
            elif node.module.split(".")[0] in ("lkd", "meta", "tests"):
                module = importlib.import_module(node.module)
                known = {each.name for each in node.names if hasattr(module, each.name)}
            else:
                continue
            missing += [f"{path.name}: {node.module}.{each.name}" for each in node.names if each.name not in known]
    assert not missing


def list_names(path: Path) -> set[str]:
    """The names that a file defines or imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imported = {each.asname or each.name for node in nodes if isinstance(node, ast.ImportFrom) for each in node.names}
    return defined | imported | {node.id for node in nodes if isinstance(node, ast.Name)}
