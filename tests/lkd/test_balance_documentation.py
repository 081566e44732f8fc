"""docs/balance.md says what the code does."""

import inspect
import re
from pathlib import Path

from lkd.balance.balancing import BALANCES

TEXT = (Path(__file__).parents[2] / "docs" / "balance.md").read_text()


def test_every_balance_has_a_row_with_its_options() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .* \| (`[^`]*`|as `dynamic`) \| [^|]*\|$", TEXT, re.MULTILINE)
    documented = {name: options for names, options in rows for name in re.findall(r"\w+", names)}
    assert documented.keys() == BALANCES.keys()
    for name, balance in BALANCES.items():
        parameters = inspect.signature(balance).parameters
        options = "; ".join(f"{n}: {p.default:g}" for n, p in parameters.items() if n != "direction")
        expected = "as `dynamic`" if name == "reversed" else f"`{options}`"
        assert documented[name] == expected, name
