"""Every code block of the documentation runs, and every page is in its table of contents."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lkd.config import MetaSettings, PoolContents, PoolSettings
from lkd.config.parse import COMMANDS, parse_recipe
from lkd.data import DATASETS
from lkd.losses.build import LOSSES, build_loss
from lkd.losses.torchdistill import REFUSED
from tests.tables import TABLES, write_table

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
GROUPS = {"pool": PoolSettings, "meta": MetaSettings}
ELSEWHERE = ("reuse.md", "python.md")  # their Python blocks: test_reuse_examples.py


def find_blocks(path: Path, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if find_blocks(p, "python")], ids=lambda page: page.name)
def test_python_blocks_run_one_after_another(page: Path, monkeypatch) -> None:
    if page.name in ELSEWHERE:
        assert page.name in Path(__file__).with_name("test_reuse_examples.py").read_text()
        return
    monkeypatch.setitem(LOSSES, "kept", LOSSES["kd"])  # what a block registers goes when the test ends
    monkeypatch.setattr("lkd.losses.build.LOSSES", dict(LOSSES))
    monkeypatch.setattr("lkd.data.readers.DATASETS", DATASETS)
    before = set(DATASETS)
    space: dict[str, object] = {}
    try:
        for block in find_blocks(page, "python"):
            exec(compile(block, page.name, "exec"), space)
    finally:
        for name in set(DATASETS) - before:
            del DATASETS[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_parser_takes(page: Path) -> None:
    """The commands of the README are run; these are parsed, with their recipe files and every option."""
    (Path.cwd() / "configs").symlink_to(ROOT / "configs")
    for line in "\n".join(find_blocks(page, "sh", "bash", "")).replace("\\\n", " ").splitlines():
        for part in line.split("#")[0].split("&&"):
            match = re.search(r"(?:^|\s)(?:lkd|-m lkd\.cli) (.*)", part.strip())
            if not match:
                continue
            assert match[1].split()[0] in COMMANDS, line
            inner = match[1].rstrip("'") if match[1].count("'") % 2 else match[1]  # of a command within quotes
            words = [word for word in shlex.split(inner) if word not in ("...", "RECIPE.yaml", "RECIPE")]
            recipe = parse_recipe(words[0], words[1:])
            assert isinstance(recipe, COMMANDS[words[0]][0]), line


def test_yaml_and_json_blocks_can_be_read_and_every_page_is_in_the_table_of_contents() -> None:
    for page in PAGES:
        assert all(yaml.safe_load(block) for block in find_blocks(page, "yaml")), page
        assert all(json.loads(block) for block in find_blocks(page, "json")), page
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(re.findall(r"\w+\.md", json.dumps(navigation))) == {page.name for page in PAGES}


@pytest.mark.parametrize(("page", "table"), [entry[:2] for entry in TABLES])
def test_tables_are_current(page: str, table: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    assert write_table(text, table) == text, "python -m tests.tables"
    assert "| ? |" not in text


def test_losses_that_have_no_row_are_named() -> None:
    text = (ROOT / "docs/losses.md").read_text()
    assert all(f"`{name}`" in text for name in REFUSED)
    inner = build_loss("logit_standardization").loss
    assert f"its default is `{{name: kd, weight: {inner.weight}, temperature: {inner.temperature}}}`" in text


def test_options_of_a_meta_training_that_are_named_exist_and_all_of_the_draw_are_named() -> None:
    text = (ROOT / "docs/meta_training.md").read_text()
    named = {f"{group}.{name}" for group, name in re.findall(r"`(pool|meta)\.(\w+)`", text)}
    fields = {f"{group}.{f.name}" for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}
    contents = {f"pool.{f.name}" for f in dataclasses.fields(PoolContents)}
    assert named <= fields
    assert {name for name in fields - contents if name.startswith("pool")} <= named


def test_the_pages_build(tmp_path) -> None:
    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for part in ("lkd", "meta"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    subprocess.run([sys.executable, "-m", "zensical", "build"], cwd=tmp_path, check=True, capture_output=True)
    pages = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert not re.search(r'<(?:link|script)[^>]+(?:href|src)="(?:https?:)?//', pages)  # nothing is asked of others
    assert "measure_trust" in (tmp_path / "site/api/index.html").read_text(), "docstrings are in the reference"


def test_every_command_and_every_loss_is_in_the_reference() -> None:
    commands, losses = ((ROOT / "docs" / name).read_text() for name in ("commands.md", "loss_options.md"))
    for name, (recipe, _) in COMMANDS.items():
        assert f'::: {recipe.__module__}.{recipe.__name__}\n    options: {{heading: "lkd {name}"' in commands
    for name, loss in LOSSES.items():
        assert f'::: {loss.__module__}.{loss.__name__}\n    options: {{heading: "{name}"' in losses
