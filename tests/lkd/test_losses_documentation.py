"""docs/losses.md names every loss with the options and defaults that it has."""

import inspect
import re
from pathlib import Path
from typing import Any

from lkd.losses.build import FEATURE_LOSSES, LOSSES, build_loss
from lkd.losses.learned import FORMS, FeatureLoss
from lkd.losses.stages import pair_equal_sizes, pair_last
from lkd.losses.torchdistill import RECIPES, REFUSED

TEXT = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
ROWS = {
    name: [cell.strip() for cell in cells.split("|")]
    for name, cells in re.findall(r"^\| `([\w/]+)` \| (.*) \|$", TEXT, re.MULTILINE)
    if name != "features"
}
NETWORK = {"first": (4, 6, 6), "middle": (6, 3, 3), "last": (8, 1, 1)}


def format_option(name: str, default: Any) -> str:
    if default is inspect.Parameter.empty:
        return name
    number = isinstance(default, float)
    return f"{name}: {f'{default:.3g}' if number and default < 1000 else f'{default:g}' if number else default}"


def format_options(options: dict[str, Any]) -> str:
    return f"`{'; '.join(format_option(*option) for option in options.items())}`" if options else "none"


def test_every_loss_has_a_row_and_every_row_a_loss() -> None:
    assert list(ROWS) == [*LOSSES, *(f"torchdistill/{name}" for name in RECIPES)]
    assert all(f"`{name}`" in TEXT for name in REFUSED)


def test_our_options_are_as_documented() -> None:
    for name, loss in LOSSES.items():
        parameters = inspect.signature(loss.__init__).parameters if "__init__" in vars(loss) else {}
        options = {n: p.default for n, p in parameters.items() if n != "self" and not n.endswith("_stages")}
        assert ROWS[name][1] == format_options(options), name
        assert (ROWS[name][3] != "no") == (name in FEATURE_LOSSES), name
    inner = build_loss("logit_standardization").loss
    assert f"its default is `{{name: kd, weight: {inner.weight}, temperature: {inner.temperature}}}`" in TEXT


def test_the_options_of_learned_losses_are_as_documented() -> None:
    rows = dict(re.findall(r"^\| (?:form )?`(\w+)` \| .* \| (`[^`]*`) \|$", TEXT, re.MULTILINE))
    for name, network in {**FORMS, "features": FeatureLoss}.items():
        parameters = inspect.signature(network.__init__).parameters
        options = {n: p.default for n, p in parameters.items() if n != "self"}
        options["conditioning"] = f"[{', '.join(options['conditioning'])}]"
        assert rows[name] == format_options(options), name


def test_the_options_of_torchdistill_s_are_as_documented() -> None:
    for name, recipe in RECIPES.items():
        stages = {"stages": None} if recipe.pairing else {}
        weights = {"task": float(recipe.task), "distillation": recipe.distillation}
        row = ROWS[f"torchdistill/{name}"]
        assert row[1] == format_options({**weights, **stages, **recipe.options}), name
        pairing = {None: "no", pair_last: "last stage", pair_equal_sizes: "deepest of each common size"}
        assert row[3] == pairing[recipe.pairing], name


def test_the_default_pairs_are_as_documented() -> None:
    pairs = {
        "last stage": [("last", "last")],
        "middle stage": [("middle", "middle")],
        "deepest of each common size": [(stage, stage) for stage in NETWORK],
    }
    for name in FEATURE_LOSSES:
        assert build_loss(name, NETWORK, NETWORK).pairs == pairs[ROWS[name][3]], name
