"""`lkd report`: what the page shows is what the runs say, whatever state they are in."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lkd import load_loss, save_loss
from lkd.cli import main
from lkd.config import CompareRecipe
from lkd.config.parse import parse_recipe
from lkd.core.files import read_json, write_json
from lkd.core.tensor_files import write_tensors
from lkd.evaluation.report.charts import MOST_SURFACES, describe_curve, draw_loss
from lkd.evaluation.report.page import build_page, command_line
from lkd.evaluation.report.runs import Point, describe_header, name_apart, read_curves, read_runs, thin
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.learned.shares import gradient_surface
from lkd.losses.learned.trust import Trust, TrustFigures
from lkd.tracking.tracker import read_log

PLANTED = [
    "<script>document.documentElement.dataset.planted = 1</script>",
    '"><img src=x onerror="document.documentElement.dataset.planted = 1">',
    "</script><script>document.documentElement.dataset.planted = 1</script><!--",
]


class Page(HTMLParser):
    """A page's elements, its words, and the JSON inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)
        self.data = json.loads(self.scripts[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    def handle_starttag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data) -> None:
        tag = self.elements[-1][0] if self.elements else ""
        if tag == "script":
            self.scripts[-1] += data
        elif tag in ("td", "th"):
            self.rows[-1][-1] += data.strip()
        self.words += data

    def row(self, first: str) -> list[str]:
        """The first table row that starts with this cell."""
        return next(row for row in self.rows if row[0] == first)

    def series(self, metric: str) -> dict[str, dict]:
        """Run → the curve of a metric."""
        labels = [run["label"] for run in self.data["runs"]]
        charts = [chart for section in self.data["sections"] for chart in section["charts"] if chart["name"] == metric]
        return {labels[one["run"]]: one for chart in charts for one in chart["series"]}


@pytest.fixture
def copies(gallery: Path, tmp_path: Path) -> Path:
    """Runs that a test may damage: the working directory."""
    shutil.copytree(gallery, tmp_path, dirs_exist_ok=True)
    return tmp_path


def build(*names: str | Path) -> Page:
    return Page(build_page(read_runs([str(name) for name in names])))


def change_recipe(run: str, **changes) -> None:
    config = read_json(Path(run, "config.json"))
    write_json(Path(run, "config.json"), config | {"recipe": config["recipe"] | changes})


def append_rows(run: Path, *rows: str) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.writelines(f"{row}\n" for row in rows)


def test_the_command_writes_one_file(copies: Path, capsys) -> None:
    write_json(Path("influence/config.json"), read_json(Path("kd/config.json")) | {"command": "influence"})
    Path("influence/influence.csv").write_text("index,influence\n" + "".join(f"{n},{n}\n" for n in range(200)))
    before = {path: path.stat().st_mtime_ns for path in copies.rglob("*")}
    names = ["student", "kd", "learned", "comparison", "influence"]
    assert main(["report", *names, "--out", "pages/r.html"]) == 0
    assert "pages/r.html: 5 runs" in capsys.readouterr().out
    page = Page(Path("pages/r.html").read_text())
    assert [run["label"] for run in page.data["runs"]] == names
    assert "Most helpful first, most harmful last, of 200." in page.words
    assert [row[0] for row in page.rows if row[0].isdecimal()] == [*"01234", *map(str, range(195, 200))]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for _, attributes in page.elements:
        assert not {"src", "href", "action"} & {key for key in attributes if not attributes[key].startswith("data:")}


def test_the_page_says_what_the_runs_say(copies: Path) -> None:
    """Curves are the logs; tables give last and best; settings that differ are marked; lineage leads to the loss."""
    page = build("student", "kd", "learned", "comparison")
    for name in ("student", "kd", "learned"):
        rows = read_log(Path(name, "log.jsonl"))
        for metric in {key for row in rows for key in row} - {"step", "time"}:
            logged = {row["step"]: row[metric] for row in rows if metric in row}
            series = page.series(metric)[name]
            assert dict(zip(series["steps"], series["values"], strict=True)) == pytest.approx(logged, rel=1e-5)
    assert page.series("reuse/top1")["learned"]["steps"] == [0, 2, 3]
    assert page.series("outer/value")["learned"]["steps"] == [1, 2, 3], "a look logs at the outer step's own number"
    assert {section["axis"] for section in page.data["sections"]} == {"step", "outer step"}

    top1 = page.series("meta_validation/top1")["kd"]["values"]
    row = page.row("kd")
    assert row[:4] == ["kd", "small_cnn", "kd temperature=2", f"{top1[-1]:.2f}"]
    assert row[4].startswith(f"{max(top1):.2f} (step ")
    assert row[-1] == "finished"
    assert "3 of 3" in page.row("learned")
    assert "6 students of 2 trainings" in page.words
    assert Path("comparison/table.txt").read_text() in page.words
    assert sum(tag == "img" for tag, _ in page.elements) == 1

    page = build("student", "kd")
    assert page.row("seed") == ["seed", "0", "3"]
    assert page.row("loss.name") == ["loss.name", "learned/loss.lkd.safetensors", "kd"]
    titles = [place for place, row in enumerate(page.rows) if row[0] == "setting"]
    assert [row[0] for row in page.rows[titles[0] : titles[1]]] == ["setting", "seed", "loss.name"]
    marked = [attributes for tag, attributes in page.elements if tag == "tr" and attributes.get("class") == "differs"]
    assert len(marked) == 4, "two settings in the list of each run"

    page = build("student", "learned")
    assert "loss: learned/loss.lkd.safetensors made by learned; learned loss" in page.words
    assert "learned loss; " in build("student").words
    assert "made by" not in build("student").words


def test_the_command_line_gives_the_same_recipe(copies: Path) -> None:
    for name in ("student", "kd", "comparison", "learned"):
        (run,) = read_runs([name])
        words = shlex.split(command_line(run))
        assert words[:2] == ["lkd", run.command]
        assert run.recipe == json.loads(json.dumps(parse_recipe(run.command, words[2:]), default=vars))
    assert command_line(read_runs(["kd"])[0]).startswith("lkd distill --run_dir kd --seed 3 --data.train_size 200")
    odd = {"methods": {"it's": {"name": "kd", "grid": {"weight": [1e-05, 1.0]}}, "x": "a b"}, "baseline": "it's"}
    change_recipe("comparison", **odd)
    recipe = parse_recipe("compare", shlex.split(command_line(read_runs(["comparison"])[0]))[2:])
    assert isinstance(recipe, CompareRecipe)
    assert (recipe.methods, recipe.baseline) == (odd["methods"], "it's")


def test_surfaces_are_the_losses_or_say_why_there_are_none(copies: Path) -> None:
    page = build("student", "learned", "kd", "comparison")
    losses = {loss["name"]: loss for loss in page.data["losses"]}
    learned, kd, ce, default = (
        losses[name] for name in ("learned by learned", "kd temperature=2", "cross_entropy", "kd")
    )
    assert learned["runs"] == ["learned", "student"]
    assert set(learned["panels"]) == {"gradient at the target logit", "weight of the teacher, α", "temperature, τ"}
    points = page.data["points"]
    (frame,) = ce["panels"]["gradient at the target logit"]  # p − 1, whatever the teacher says
    row = [0.01 + 0.98 * place / (points - 1) - 1 for place in range(points)]
    assert frame == pytest.approx(row * points, abs=1e-3)
    assert kd["panels"] != default["panels"]
    for loss, reason in (("dist", "compares images"), ("fitnet", "features"), ("gone.safetensors", "no longer")):
        change_recipe("kd", loss=loss)
        (record,) = build("kd").data["losses"]
        assert reason in record["note"]
        assert not record["panels"]


def list_drawn(*names: str) -> list[list[str]]:
    """The runs of each loss that is drawn."""
    return [record["runs"] for record in build(*names).data["losses"] if record["runs"]]


def test_losses_of_different_files_are_drawn_apart_however_they_are_named(copies: Path) -> None:
    change_recipe("kd", loss={"name": str(copies / "learned" / "loss.lkd.safetensors")})
    assert list_drawn("student", "kd") == [["student", "kd"]]
    for name in ("student", "kd"):
        shutil.copytree("learned", Path("elsewhere", name))
        change_recipe(name, loss={"name": str(copies / "elsewhere" / name / "loss.lkd.safetensors")})
    Path("page").mkdir()
    os.chdir("page")  # outside of which only the last part of a path is shown
    assert list_drawn("../student", "../kd") == [["student"], ["kd"]]


def test_losses_beyond_those_that_a_page_draws_are_named(copies: Path) -> None:
    methods = {f"KD {number}": {"name": "kd", "temperature": 1 + number} for number in range(MOST_SURFACES + 2)}
    change_recipe("comparison", methods=methods)
    Path("comparison", "picks.json").unlink()
    losses = [loss for loss in build("comparison").data["losses"] if loss["runs"]]
    assert len(losses) == len(methods)
    assert [bool(loss["panels"]) for loss in losses] == [True] * MOST_SURFACES + [False] * 2
    assert all("left out" in loss["note"] for loss in losses[MOST_SURFACES:])


def test_a_learned_loss_is_said_to_reach_what_the_kept_one_did() -> None:
    looks = [{"step": 0, "top1": 80.0, "calibrated_cross_entropy": 0.9}]
    looks += [{"step": 9, "top1": 78.0, "calibrated_cross_entropy": 0.5}]
    assert describe_header({"kind": "learned loss", "provenance": {"reuse": looks}})[1] == "78.00 % when reused"


def test_a_loss_that_reads_trust_is_drawn_as_the_run_told_it(copies: Path) -> None:
    loss = build_learned_loss("logits", {"conditioning": ["progress", "agreement"]})
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    save_loss("trusting.lkd.safetensors", loss, {})
    change_recipe("kd", loss="trusting.lkd.safetensors")
    (unknown, _) = build("kd").data["losses"]
    figures = TrustFigures(0.5, 0.4, 1.5, 20.0)
    told = {"provenance": {"trust": figures.to_json()}}
    write_tensors(Path("kd/student.safetensors"), {}, "network", 1, told)
    (known, _) = build("kd").data["losses"]
    assert unknown["trust"].startswith("trust: unknown")
    assert "50.0% of the meta-validation labels" in known["trust"]
    for record, trust in ((unknown, Trust()), (known, Trust(figures))):
        surface = gradient_surface(load_loss("trusting.lkd.safetensors", trust=trust), 0.5, points=21)
        drawn = record["panels"]["gradient at the target logit"][2]
        assert drawn == pytest.approx(surface.flatten().tolist(), rel=1e-3)
    assert known["panels"] != unknown["panels"]


def test_worlds_have_a_line_each_and_the_worst_regret_of_the_kept_loss_comes_first(copies: Path) -> None:
    worlds = [f"world-{number}" for number in range(45)]
    shutil.copytree("learned", "worlds")
    Path("worlds/log.jsonl").write_text("")
    for step, kept in ((0, 0.9), (10, 0.4), (20, 0.5)):
        regrets = {f"reuse/world/{name}/regret": number - step for number, name in enumerate(worlds)}
        scores = {f"reuse/world/{name}/calibrated_cross_entropy": 1.0 for name in worlds}
        mean = {"reuse/calibrated_cross_entropy": kept, "reuse/regret": 0.25}
        drawn = {f"world/{name}/outer_value": 2.0 for name in worlds[step:]}
        append_rows(Path("worlds"), json.dumps({"step": step, **mean, **regrets, **scores, **drawn}))
    page = build("worlds", "learned")
    charts = {chart["name"]: chart for section in page.data["sections"] for chart in section["charts"]}
    lines = {one["world"]: one for one in charts["worlds: reuse/regret"]["series"]}
    assert list(lines) == worlds
    assert lines["world-7"]["values"] == [7, -3, -13]
    outer = {one["world"]: one for one in charts["worlds: outer_value"]["series"]}
    assert outer["world-30"]["steps"] == [0, 10, 20]
    assert all(outer[name]["line"] == lines[name]["line"] for name in worlds)
    assert not any("world/" in name for name in charts)
    place = page.rows.index(page.row("mean"))
    assert page.rows[place - 1][1] == "regret of the loss after outer step 10"
    assert page.rows[place][1:3] == ["+0.2500", "0.4000"]
    assert [row[:2] for row in page.rows[place + 1 : place + 46]] == [
        [name, f"{number - 10:+.4f}"] for number, name in reversed(list(enumerate(worlds)))
    ]


def test_runs_over_different_data_are_apart(copies: Path) -> None:
    shutil.copytree("kd", "noisy")
    change_recipe("noisy", data=read_json(Path("kd/config.json"))["recipe"]["data"] | {"label_noise": 0.4})
    page = build("kd", "noisy", "student")
    assert "These runs do not share their data." in page.words
    assert "label noise 0.4" in page.words
    for section in page.data["sections"]:
        shown = {one["run"] for chart in section["charts"] for one in chart["series"]}
        assert shown in ({0, 2}, {1})
    assert "do not share" not in build("kd", "student").words


def test_damaged_and_unfinished_runs_are_shown_with_what_there_is(copies: Path) -> None:
    top1 = '{"step": %s, "time": 1.0, "meta_validation/top1": %s, "note": "text", "flag": true}'
    append_rows(Path("kd"), top1 % (50, "NaN"), '{"step": 60, "meta_val', "3", "[]", '{"time": 3}', "\x00")
    append_rows(Path("kd"), top1 % (51, "Infinity"), top1 % (52, "-Infinity"), top1 % (53, 10**400), top1 % ("NaN", 1))
    Path("kd/student.safetensors").unlink()
    Path("student/log.jsonl").write_text("")
    Path("learned/log.jsonl").unlink()
    Path("learned/environment.json").write_text("{")
    Path("learned/loss.lkd.safetensors").write_bytes(b"cut off")
    for name in ("table.txt", "result.json", "log.jsonl"):
        Path("comparison", name).unlink()
    next(Path("comparison/cells").glob("report-CE*seed1*")).unlink()
    page = build("kd", "student", "learned", "comparison")
    series = page.series("meta_validation/top1")["kd"]
    assert series["values"][-4:] == [None] * 4
    assert series["strange"] == 4
    assert page.series("note") == page.series("flag") == {}
    assert page.row("kd")[-1] == "not finished: running or cut off; 6 damaged log lines skipped"
    assert "nothing logged" in page.row("student")[-1]
    assert "nothing logged" in page.row("learned")[-1]
    assert "damaged or not a safetensors file" in next(loss["note"] for loss in page.data["losses"] if loss["note"])
    assert "Finished: 3 reported trainings, 0 for tuning." in page.words
    assert sum(row[:2] == ["small_cnn", "KD"] for row in page.rows) == 2


def test_what_is_no_run_is_one_line_and_code_2(copies: Path, capsys) -> None:
    for name, text in (("foreign", '{"model_type": "bert"}'), ("broken", "{")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    Path("empty").mkdir()
    for words, named in (
        ([], "runs: none"),
        (["nowhere"], "runs: nowhere"),
        (["empty"], "runs: empty"),
        (["foreign"], "runs: foreign/config.json"),
        (["broken"], "broken/config.json: "),
        (["kd", "--out", "student.safetensors"], "out: student.safetensors"),
        (["kd", "--out", "kd/log.jsonl/page.html"], "kd/log.jsonl/page.html: "),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert named in error
        assert "\n" not in error
        assert not Path("report.html").exists()


def plant(folder: Path) -> list[str]:
    """Runs whose name, wandb name, settings, method labels, notes and metrics hold scripts."""
    name = PLANTED[1].replace("/", "")
    shutil.copytree("kd", folder / name)
    recipe = read_json(folder / name / "config.json")["recipe"]
    change_recipe(
        name,
        wandb=recipe["wandb"] | {"name": PLANTED[0]},
        student=recipe["student"] | {"name": PLANTED[2]},
        loss={"name": PLANTED[2], "x": PLANTED[1]},
        data=recipe["data"] | {"name": PLANTED[0]},
        teacher=recipe["teacher"] | {"path": PLANTED[2] + ".safetensors"},
    )
    write_json(folder / name / "environment.json", {"commit": PLANTED[0], "versions": {PLANTED[1]: PLANTED[2]}})
    metrics = {f"{text}/{text}": 1.0 for text in PLANTED} | {f"time_share/{PLANTED[1]}": 0.5}
    append_rows(folder / name, json.dumps({"step": 1, "time": 1.0, **metrics}))
    change_recipe("comparison", methods={text: text for text in PLANTED})
    Path("comparison/table.txt").write_text("\n".join(PLANTED))
    write_json(Path("comparison/result.json"), {"figures": {PLANTED[0]: PLANTED[2]}})
    return [str(folder / name), "comparison"]


def test_text_from_runs_stays_text(copies: Path) -> None:
    page = build(*plant(copies))
    scripts = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert scripts == ["application/json", None]
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert all(attributes["src"].startswith("data:image/png") for tag, attributes in page.elements if tag == "img")
    assert all(text in page.words for text in PLANTED), "shown, as text"


def test_long_curves_are_thinned_to_their_shape() -> None:
    count, spike, dip = 100_000, 43_210, 77_777
    values = [math.sin(step / 9000) for step in range(count)]
    values[spike], values[dip], values[500] = 50.0, -50.0, math.nan
    found = describe_curve([Point(step, 1e9 + step, value) for step, value in enumerate(values)], 1e9, 1000)
    assert len(found["steps"]) <= 1002
    assert (found["total"], found["strange"]) == (count, 1)
    drawn = dict(zip(found["steps"], found["values"], strict=True))
    assert drawn.items() >= {(spike, 50.0), (dip, -50.0), (500, None)}
    assert (found["steps"][0], found["steps"][-1], found["seconds"][-1]) == (0, count - 1, count - 1)
    curve = [Point(1, 0.0, 5.0), Point(2, 0.0, math.nan), Point(3, 0.0, 4.0)]
    assert thin(curve, 3) is curve
    assert thin(curve, 1) == curve
    assert len(thin([Point(step, 0.0, math.nan) for step in range(100)], 9)) <= 5


def test_a_repeated_step_counts_as_it_was_last_written_and_names_tell_runs_apart(tmp_path: Path) -> None:
    rows = [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 2, "b": 7}, {"step": 1, "a": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = read_curves(tmp_path / "log.jsonl").curves
    assert {name: [(step, value) for step, _, value in curve] for name, curve in curves.items()} == {
        "a": [(1, 3), (2, 2)],
        "b": [(2, 7)],
    }
    paths = [Path("/x/a/student"), Path("/x/b/student"), Path("/x/b/kd")]
    assert name_apart(paths) == ["a/student", "b/student", "kd"]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
TOUCH = """
<script>
document.querySelector('#legend button[data-run="1"]').click();
const chart = document.querySelector('figure[data-metric="meta_validation/top1"] svg');
const box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 9, clientY: box.top + 50}));
</script>
"""


def render(path: Path, folder: Path, address: str = "") -> tuple[Page, str]:
    """The page after its scripts have run, and what the browser's console said."""
    options = f"--headless --no-sandbox --disable-gpu --user-data-dir={folder / 'browser'} --enable-logging=stderr"
    command = [BROWSER, *options.split(), "--virtual-time-budget=2000", "--dump-dom", path.resolve().as_uri() + address]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return Page(result.stdout), "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


def drawn_runs(page: Page) -> set[str]:
    return {attributes["data-run"] for tag, attributes in page.elements if tag == "path" and "data-run" in attributes}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_it_and_runs_nothing_that_was_planted(copies: Path) -> None:
    planted = plant(copies)
    assert main(["report", "kd", "student", "learned", *planted]) == 0
    text = Path("report.html").read_text()
    page, console = render(Path("report.html"), copies, "#off=0")
    assert console == ""
    metrics = {attributes.get("data-metric") for tag, attributes in page.elements if tag == "figure"} - {None}
    assert metrics == {chart["name"] for section in page.data["sections"] for chart in section["charts"]}
    assert drawn_runs(page) == {"1", "2", "3"}, "run 0 is off by the address"
    assert sum(tag == "canvas" for tag, _ in page.elements) == sum(len(loss["panels"]) for loss in page.data["losses"])
    # Without its security policy nothing but the escaping is between the planted texts and the browser.
    unguarded = re.sub(r"<meta http-equiv.*?>", "", text).replace("</body>", f"{TOUCH}</body>")
    Path("unguarded.html").write_text(unguarded)
    page, console = render(Path("unguarded.html"), copies)
    assert console == ""
    assert drawn_runs(page) == {"0", "2", "3"}, "run 1 was switched off"
    last = page.series("meta_validation/top1")["kd"]
    assert f"step {last['steps'][-1]}{last['values'][-1]:g} kd" in page.words
    assert "data-planted" not in dict(page.elements)["html"]
    Path("broken.html").write_text(text.replace('"use strict";', '"use strict"; nowhere();'))
    assert render(Path("broken.html"), copies)[1], "a mistake, or a script that the policy refuses, is seen"


def test_the_loss_that_ships_is_drawn_whatever_folder_has_its_name() -> None:
    Path("universal").mkdir()
    record = draw_loss("universal", "universal", Path.cwd(), Trust(TrustFigures(0.9, 0.8)))
    assert record["note"] is None
    assert len(record["panels"]) == 3
    assert "of its batch it is told" in record["trust"]
