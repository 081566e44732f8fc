"""Tables of the documentation that follow from code and evidence: `python -m tests.tables` writes them.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Some columns are written; the other cells are
prose, kept as they are. A new row has `?` there, which the test of the documentation finds.
"""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lkd.balance.balancing import BALANCES
from lkd.losses.build import FEATURE_LOSSES, LOSSES, build_loss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.forms import FORMS
from lkd.losses.torchdistill import RECIPES

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS = "options and defaults"
NETWORK = {"first": (4, 6, 6), "middle": (6, 3, 3), "last": (8, 1, 1)}
PAIRS = {("last",): "last stage", ("middle",): "middle stage", tuple(NETWORK): "deepest of each common size"}
PAIRINGS = {"pair_last": PAIRS["last",], "pair_equal_sizes": PAIRS[tuple(NETWORK)]}
Rows = dict[str, dict[str, str]]


def main() -> None:
    for page, table, _ in TABLES:
        path = DOCS / page
        path.write_text(write_table(path.read_text(), table))


def write_table(page: str, table: str) -> str:
    """A page with one of its tables as the code has it."""
    rows = next(find_rows for _, name, find_rows in TABLES if name == table)()
    return replace_between(page, f"table: {table}", lambda old: fill(old, rows))


def replace_between(page: str, mark: str, replace: Callable[[str], str]) -> str:
    """A page with another text between a mark and the next mark of an end."""
    before, start, rest = page.partition(f"<!-- {mark} -->\n\n")
    old, end, after = rest.partition("\n\n<!-- end -->")
    assert start, f"the mark {mark!r} is missing"
    assert end, f"the end after {mark!r} is missing"
    return before + start + replace(old) + end + after


def fill(table: str, rows: Rows) -> str:
    """A table with these rows; what they do not have is taken from the row of that name."""
    header, rule, *old = table.splitlines()
    columns = split(header)
    cells = {split(line)[0]: split(line) for line in old}
    lines = []
    for name, row in rows.items():
        kept = cells.get(name, [name, *["?"] * (len(columns) - 1)])
        lines.append(
            f"| {' | '.join(row.get(*pair) for pair in zip(columns, kept, strict=True))} |".replace("|  |", "| |")
        )
    return "\n".join([header, rule, *lines])


def split(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def list_losses() -> Rows:
    found = {}
    for name, loss in LOSSES.items():
        own = inspect.signature(loss.__init__).parameters if "__init__" in vars(loss) else {}
        options = {n: p.default for n, p in own.items() if n not in ("self", "student", "teacher")}
        pairs = build_loss(name, NETWORK, NETWORK).pairs if name in FEATURE_LOSSES else []
        assert all(student == teacher for student, teacher in pairs)
        stages = PAIRS[tuple(student for student, _ in pairs)] if pairs else "no"
        found[f"`{name}`"] = {OPTIONS: format_options(options), "features": stages}
    return found


def list_torchdistill() -> Rows:
    found = {}
    for name, recipe in RECIPES.items():
        options = {"task": float(recipe.task), "distillation": recipe.distillation}
        options |= ({"stages": None} if recipe.pairing else {}) | recipe.options
        stages = PAIRINGS[recipe.pairing.__name__] if recipe.pairing else "no"
        found[f"`torchdistill/{name}`"] = {OPTIONS: format_options(options), "features": stages}
    return found


def list_learned() -> Rows:
    networks: dict[str, Any] = {f"form `{name}`": form for name, form in FORMS.items()}
    found = {}
    for name, network in (networks | {"`features`": FeatureLoss}).items():
        own = inspect.signature(network.__init__).parameters
        options = {n: p.default for n, p in own.items() if n not in ("self", "student", "teacher")}
        options["conditioning"] = f"[{', '.join(options['conditioning'])}]"
        found[name] = {OPTIONS: format_options(options)}
    return found


def list_balances() -> Rows:
    found = {}
    for name, balance in BALANCES.items():
        parameters = inspect.signature(balance).parameters.items()
        found[f"`{name}`"] = {OPTIONS: format_options({n: p.default for n, p in parameters})}
    return found


def list_evidence() -> Rows:
    """What made each folder of docs/evidence, and when."""
    found = {}
    for path in sorted((DOCS / "evidence").rglob("result.json")):
        folder, result = path.parent.relative_to(DOCS), json.loads(path.read_text())
        made = {"command": f"`{result['command']}`", "commit": result["commit"], "date": result["date"]}
        found[f"[{folder.relative_to('evidence')}]({folder})"] = made
    return found


def format_options(options: dict[str, Any]) -> str:
    return f"`{'; '.join(format_option(*option) for option in options.items())}`" if options else "none"


def format_option(name: str, default: Any) -> str:
    if default is inspect.Parameter.empty:
        return name
    number = isinstance(default, float)
    return f"{name}: {f'{default:.3g}' if number and default < 1000 else f'{default:g}' if number else default}"


TABLES: list[tuple[str, str, Callable[[], Rows]]] = [  # page, table, its rows
    ("losses.md", "losses", list_losses),
    ("losses.md", "torchdistill", list_torchdistill),
    ("losses.md", "learned", list_learned),
    ("balance.md", "balances", list_balances),
    ("results.md", "evidence", list_evidence),
]

if __name__ == "__main__":
    main()
