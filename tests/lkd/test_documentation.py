"""Every code block of the documentation runs, and every page is in its table of contents."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lkd.config.parse import COMMANDS, parse_recipe
from lkd.data import DATASETS
from lkd.losses.build import LOSSES

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = {  # pages whose Python blocks have tests of their own
    "reuse.md": "test_reuse_examples.py",
    "python.md": "test_reuse_examples.py",
}


def find_blocks(path: Path, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if find_blocks(p, "python")], ids=lambda page: page.name)
def test_python_blocks_run_one_after_another(page: Path, monkeypatch) -> None:
    if page.name in ELSEWHERE:
        assert page.name in (ROOT / "tests" / "lkd" / ELSEWHERE[page.name]).read_text()
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
            if not match or match[1].split()[0] not in COMMANDS:
                continue
            inner = match[1].rstrip("'") if match[1].count("'") % 2 else match[1]  # of a command within quotes
            words = [word for word in shlex.split(inner) if word not in ("...", "RECIPE.yaml", "RECIPE")]
            recipe = parse_recipe(words[0], words[1:])
            assert isinstance(recipe, COMMANDS[words[0]][0]), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_and_json_blocks_can_be_read(page: Path) -> None:
    for block in find_blocks(page, "yaml"):
        assert yaml.safe_load(block)
    for block in find_blocks(page, "json"):
        json.loads(block)


def test_every_page_is_in_the_table_of_contents() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {
        name
        for entry in navigation
        for value in entry.values()
        for name in ([value] if isinstance(value, str) else value)
    }
    assert listed == {page.name for page in PAGES}


def test_the_pages_build(tmp_path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0, result.stderr[-2000:]
    pages = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert not re.search(r'<(?:link|script)[^>]+(?:href|src)="(?:https?:)?//', pages)  # nothing is asked of others
    assert "Meta-train" in pages or "meta-train" in pages
