"""Panels name what real runs log; what would be sent is what is sent."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wandb

from lkd.cli import main
from lkd.evaluation.dashboard import list_empty, read_names, read_panels
from lkd.tracking.tracker import read_log
from tests.faults.wandb_server import StandIn
from tests.lkd.test_tracking import KEY, read_history, read_wandb

pytest.importorskip("wandb_workspaces")
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/tracking.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
RUNS = ("student", "learned", "comparison")
SIZES = "--data.train_size 100 --data.meta_validation_size 60 --train.epochs 1 --train.batch_size 50"
OUTER = "--pool.students 1 --pool.snapshots 2 --meta.outer_steps 2 --meta.rollout_steps 2 --meta.picture_every 2"
METHODS = "--methods '{CE: cross_entropy, KD: {name: kd, weight: 0.5}}' --seeds 2 --workers 1"
SMALL = {
    "distill": f"{SIZES} --student.name tiny_cnn --report_test true",
    "meta-train": f"{SIZES} --student.name tiny_cnn {OUTER} --meta.reuse_students 1 --meta.reuse_epochs 1",
    "compare": f"{SIZES} {METHODS} --students '[{{name: tiny_cnn}}]'",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """The runs that docs/tracking.md makes, in small: a distillation, a meta-training, a comparison, one in trackio."""
    pytest.importorskip("trackio")
    folder = tmp_path_factory.mktemp("documented")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_SILENT", "true")
        patch.setattr("lkd.evaluation.comparison.compare.start_workers", lambda *_, **__: ThreadPoolExecutor(1))
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))  # which trackio reads when it is imported
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            patch.delitem(sys.modules, name)
        for line in COMMANDS:
            _, command, *words = shlex.split(line)
            assert main([command, *words, *shlex.split(SMALL.get(command, ""))]) == 0, line
        yield folder / "runs"


@pytest.fixture
def server(monkeypatch):
    stand_in = StandIn()
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", stand_in.address)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield stand_in
    wandb.teardown()
    stand_in.die()


def collect(tree: Any, key: str) -> list[Any]:
    """All values of a key in a JSON tree."""
    if isinstance(tree, list):
        return [value for child in tree for value in collect(child, key)]
    if not isinstance(tree, dict):
        return []
    return [found for name, child in tree.items() for found in ([child] if name == key else collect(child, key))]


def test_every_panel_shows_what_real_runs_log(runs: Path) -> None:
    names = set().union(*(read_names(runs / run) for run in RUNS))
    assert list_empty(read_panels(), names) == []
    for made_up, missing in (
        ({"metrics": ["outer/valeu", "outer/value"]}, "outer/valeu"),
        ({"metric_regex": "^o$"}, "^o$"),
    ):
        assert list_empty({"S": [{"title": "New", **made_up}]}, names) == [f"S: New: {missing}"]
    sent = {key.removesuffix("._type") for run in RUNS for row in read_history(read_wandb(runs / run)) for key in row}
    assert names <= sent, "as W&B's own reader has them"


def test_the_documentation_names_what_is_logged(runs: Path) -> None:
    named = [name for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]
    patterns = [re.sub("[A-Z]+", ".+", name) for name in named]
    logged = {name for run in RUNS for row in read_log(runs / run / "log.jsonl") for name in row} - {"step", "time"}
    assert [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in logged)] == []


def test_trackio_keeps_what_was_logged(runs: Path) -> None:
    import trackio

    (run,) = trackio.Api().runs("trials")
    assert run.name.startswith("local-")
    rows = read_log(runs / "local" / "log.jsonl")
    for name in {name for row in rows for name in row} - {"step", "time"}:
        kept = trackio.sqlite_storage.SQLiteStorage.get_metric_values("trials", run.name, name)
        assert {row["step"]: row["value"] for row in kept} == {row["step"]: row[name] for row in rows if name in row}


def test_the_terms_of_a_loss_leave_out_what_a_meta_training_logs_beside_them() -> None:
    (terms,) = (panel for panel in read_panels()["Distillation"] if panel["title"] == "Terms of the loss")
    for name in ("task", "target_class", "logits/task", "distillation"):
        assert list_empty({"s": [terms]}, [f"loss/{name}"]) == [], name
    assert list_empty({"s": [terms]}, ["loss/weight", "loss/temperature"])


def test_a_dry_run_writes_the_workspace_and_says_what_stays_empty(runs: Path, capsys) -> None:
    assert main(["dashboard", "--dry_run", "--out", "out", "--runs", f"[{runs / 'student'}]", "--name", "Ours"]) == 0
    printed = capsys.readouterr().out
    assert "Meta-training: Outer loss after the rollout: outer/value" in printed
    assert "Distillation" not in printed
    written = json.loads(Path("out/workspace.json").read_text())
    assert written["displayName"] == "Ours"
    sections = collect(written, "sections")[0]
    assert [section["name"] for section in sections] == list(read_panels())
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    assert {panel["xAxis"] for panel in panels if "metrics" in panel} == {"step"}
    (outer,) = (panel for panel in panels if panel.get("metrics") == ["outer/value"])
    assert outer["smoothingWeight"] == 0.8
    assert {key for keys in collect(written, "mediaKeys") for key in keys} == {"learned_loss", "comparison"}


def test_a_report_has_the_table_and_panels_of_its_run(runs: Path, capsys) -> None:
    comparison = runs / "comparison"
    assert main(["dashboard", "--dry_run", "--out", "out", "--report", str(comparison)]) == 0
    assert "looked up when the report is sent" in capsys.readouterr().out
    written = json.loads(Path("out/report.json").read_text())
    assert (comparison / "table.txt").read_text().strip() in "\n".join(map(str, collect(written, "text")))
    assert (comparison / "wandb_run_id").read_text() in collect(written, "value")
    panels = collect(written, "panelBankSectionConfig")[0]["panels"]
    assert len(panels) == len(read_panels()["Comparison"])
    assert str(runs) not in json.dumps(written), "a report tells nothing of this machine's folders"


def test_a_comparison_outside_wandb_has_a_report_without_panels(runs: Path) -> None:
    Path("alone").mkdir()
    for name in ("config.json", "table.txt"):
        Path("alone", name).write_text((runs / "comparison" / name).read_text())
    assert main(["dashboard", "--dry_run", "--out", "out", "--report", "alone"]) == 0
    assert collect(json.loads(Path("out/report.json").read_text()), "runSets") == []


def test_what_is_sent_is_what_a_dry_run_writes(runs: Path, server: StandIn, capsys) -> None:
    report = ["--report", str(runs / "comparison")]
    for words, file in (([], "workspace.json"), (report, "report.json")):
        assert main(["dashboard", "--dry_run", "--out", "out", "--entity", "me", *words]) == 0
        assert main(["dashboard", *words]) == 0
        assert f"{server.address}/me/lkd" in capsys.readouterr().out.splitlines()[-1]
        sent = next(body["variables"] for _, body in reversed(server.requests) if "spec" in body.get("variables", {}))
        assert (sent["entityName"], sent["projectName"]) == ("me", "lkd")
        spec = json.loads(sent["spec"])
        for runset in collect(spec, "runSets")[0] if words else []:
            assert runset.pop("project") == {"entityName": "me", "name": "lkd", "id": "7"}
        assert strip_ids(spec) == strip_ids(json.loads(Path("out", file).read_text())["spec"])


def strip_ids(tree: Any) -> Any:
    """Without the ids that wandb-workspaces draws."""
    if isinstance(tree, list):
        return [strip_ids(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: strip_ids(child) for key, child in tree.items() if key not in ("id", "__id__")}


def test_a_mistake_is_one_line(runs: Path, capsys) -> None:
    for words, field in (
        (["--report", "nowhere"], "report: nowhere "),
        (["--report", f"{runs}/student"], "table.txt missing"),
        (["--runs", "[nowhere]"], "runs: nowhere "),
        (["--name", "LKD 🚀"], "name: 'LKD 🚀': "),
    ):
        assert main(["dashboard", "--dry_run", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert field in error
        assert "\n" not in error


def test_nobody_logged_in_is_one_line(monkeypatch, capsys, unused_tcp_port: int) -> None:
    wandb.teardown()
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused_tcp_port}")
    assert main(["dashboard"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("lkd: error: dashboard: nothing was sent: .*; run `wandb login`, or .* --dry_run", error)
    wandb.teardown()


def test_without_wandb_workspaces_the_line_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "--dry_run"]) == 2
    assert "pip install wandb-workspaces" in capsys.readouterr().err
