"""docs/meta_training.md names the options that there are."""

import dataclasses
import re
from pathlib import Path

from lkd.config import MetaSettings, PoolContents, PoolSettings


def test_every_option_named_exists_and_every_option_of_the_draw_is_named() -> None:
    text = (Path(__file__).parents[2] / "docs" / "meta_training.md").read_text()
    named = {tuple(name) for name in re.findall(r"`(pool|meta)\.(\w+)`", text)}
    fields = {
        (group, field.name)
        for group, kind in (("pool", PoolSettings), ("meta", MetaSettings))
        for field in dataclasses.fields(kind)
    }
    assert named <= fields
    contents = {field.name for field in dataclasses.fields(PoolContents)}
    assert {name for group, name in fields if group == "pool"} - contents == {n for g, n in named if g == "pool"}
