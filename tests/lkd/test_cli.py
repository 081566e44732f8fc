"""The command line as a user meets it: help, words, overrides, mistakes, Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from lkd.cli import main
from lkd.config import DistillRecipe, TrainRecipe
from lkd.config.parse import COMMANDS, make_recipe, parse_recipe, split_files
from lkd.core.errors import UserError
from lkd.models.files import load_network
from lkd.training.training import Training
from tests.processes import Command, fork_workers

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
TINY = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--train.epochs", "2"]


def test_help_answers_at_once() -> None:
    started = os.times()
    command = [sys.executable, "-m", "lkd.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    ended = os.times()
    assert ended.children_user + ended.children_system - started.children_user - started.children_system < 1
    assert all(command in result.stdout for command in COMMANDS)
    assert main([]) == 0
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command: str, capsys) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    options = [
        part for part in re.split(r"\n  (?=--)", text)[1:] if not part.startswith(("--config", "--print_config"))
    ]
    assert len(options) > 1
    for option in options:
        name, _, explanation = option.replace("CONFIG", "", 1).partition(" ")
        assert len(explanation.split("(type")[0].split()) > 1, f"{name} is not explained"


def test_the_line_wins_over_files_and_later_files_over_earlier(tmp_path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\ntrain: {epochs: 3, batch_size: 5}\n")
    second.write_text("train: {epochs: 4}\n")
    recipe = parse_recipe("distill", [str(first), str(second), "--seed", "9"])
    assert (recipe.seed, recipe.train.epochs, recipe.train.batch_size, recipe.train.momentum) == (9, 4, 5, 0.9)
    assert parse_recipe("quickstart", ["--short", "--seeds", "2"]).short is True
    assert parse_recipe("quickstart", ["--short", "false"]).short is False
    assert parse_recipe("distill", ["--loss", "kd"]).loss == "kd"
    assert parse_recipe("distill", ["--loss", "{name: kd, weight: 0.2}"]).loss == {"name": "kd", "weight": 0.2}
    assert parse_recipe("distill", ["--loss.name", "kd", "--loss.weight", "0.2"]).loss == {"name": "kd", "weight": 0.2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil"], "unknown command 'distil'; nearest: distill"),
        (["distill", "--trian.epochs", "3"], "unknown key 'trian.epochs'; nearest: train.epochs"),
        (["distill", "missing.yaml"], "missing.yaml"),
        (["distill", "wrong.yaml"], "unknown key 'train.epoch'; nearest: train.epochs"),
        (["distill", "broken.yaml"], "broken.yaml"),
        (["distill", "--student.name", "smal_cnn"], "network: unknown name 'smal_cnn'; nearest: small_cnn"),
        (["distill", "--loss", "kdd"], "loss: unknown name 'kdd'; nearest: kd"),
        (["distill", "--loss", "{name: kd, tau: 3}"], "tau"),
        (["distill", "--data.name", "fashion_mnist"], "data.root: missing"),
        (["distill", "--teacher.path", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["distill", "--device", "cuda:99"], "device"),
        (["distill", "--help-me"], "unknown key 'help-me'"),
        (["distill", "--data.name", "image_folder", "--data.root", "/nowhere"], "data.root: /nowhere: no such folder"),
        (["report", "."], "it has no config.json; name some in it: one two"),
        (["distill", "--run_dir", "/proc/nowhere"], "run_dir: /proc/nowhere cannot be written"),
        (["meta-train", "--meta.estimator", "magic"], "meta.estimator: unknown name 'magic'"),
        (["pool", "--pool.loss", "kdd"], "loss: unknown name 'kdd'; nearest: kd"),
        (["meta-train", "--pool_dir", "nowhere"], "pool_dir: nowhere holds no pool"),
        (["evaluate", "nowhere"], "nowhere: no such file"),
        (["cache"], "teacher.cache: missing"),
        (["influence", "--loss", "fitnet"], "reads features; influence takes losses over logits"),
        (["distill", "--loss", "{weight: 1}"], "loss"),
        (["distill", "--teacher.path", "random"], "teacher.name"),
        (["distill", "--student.name", "tiny_cnn", "--student.pretrained", "true"], "no `pretrained` weights"),
        (["meta-train", "--worlds", "{a: {}}", "--students", "[{name: tiny_cnn}]"], "students"),
        (["meta-train", "--worlds", "{a: {}}", "--meta.interleaving", "alternate"], "meta.interleaving"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words, message: str, capsys) -> None:
    Path("wrong.yaml").write_text("train: {epoch: 3}\n")
    Path("broken.yaml").write_text("train: [\n")
    for run in ("one", "two"):
        Path(run).mkdir()
        Path(run, "config.json").touch()
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("lkd: error: ")
    assert "\n" not in error


def test_an_interrupt_outside_of_a_training_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr("lkd.commands.evaluate", Mock(side_effect=KeyboardInterrupt))
    assert main(["evaluate", "embedded"]) == 130
    assert capsys.readouterr().err == "lkd: interrupted\n"


def test_a_run_directory_is_free_until_a_step_is_taken_and_not_overwritten_then(capsys) -> None:
    words = ["distill", "--run_dir", "r", *TINY, "--student.name", "tiny_cnn"]
    assert main([*words, "--teacher.path", "nowhere.safetensors"]) == 2
    assert main([*words, "--train.learning_rate", "1e30"]) == 2
    assert "step 1: the loss is not finite" in capsys.readouterr().err
    shutil.rmtree("r")
    assert main([*words, "--teacher.path", "nowhere.safetensors"]) == 2
    assert main(words) == 0
    assert main(words) == 2
    assert "already holds a run of `lkd distill`; go on with it by --resume auto" in capsys.readouterr().err
    assert main([*words, "--resume", "auto", "--seed", "4"]) == 2
    assert "seed: is 4, but the run in r has 0" in capsys.readouterr().err
    assert main(["distill", "--run_dir", "early", *TINY, "--train.learning_rate", "1e30"]) == 2
    assert main(["distill", "--run_dir", "early", *TINY, "--data.train_size", "80"]) == 0, "nothing was trained before"
    assert main(["evaluate", "--run_dir", "r"]) == 2
    assert main(["pool", "--run_dir", "r", "--resume", "auto", *TINY]) == 2
    assert "holds a run of `lkd distill`, not of `lkd pool`" in capsys.readouterr().err


def test_without_meta_validation_images_the_last_weights_are_kept(capsys) -> None:
    none = [*TINY, "--data.meta_validation_size", "0"]
    for command, role, network in (("teacher", "teacher", "model"), ("distill", "student", "student")):
        assert main([command, "--run_dir", role, *none, f"--{network}.name", "tiny_cnn"]) == 0
        assert "not evaluated: data.meta_validation_size is 0" in (said := capsys.readouterr().out)
        assert ("no labels are held out" in said) == (command == "distill")
        assert load_network(Path(role, f"{role}.safetensors"))[1]["provenance"]["meta_validation"] is None
        log = Path(role, "log.jsonl").read_text()
        assert "learning_rate" in log
        assert "meta_validation/" not in log
    assert main(["distill", "--run_dir", "student", *none, "--student.name", "tiny_cnn", "--resume", "auto"]) == 0
    assert main(["report", "student", "teacher"]) == 0
    assert main(["evaluate", "--checkpoint", "student/student.safetensors", *none[:2], *none[-2:]]) == 0


NEEDY = ["meta-train", "pool", "compare", "fidelity", "influence", "evaluate --split meta_validation"]


@pytest.mark.parametrize("words", [*NEEDY, "distill --loss.name influence_weighted"])
def test_what_needs_meta_validation_images_says_so(words: str, capsys) -> None:
    assert main([*words.split(), "--data.train_size", "200", "--data.meta_validation_size", "0"]) == 2
    error = capsys.readouterr().err
    assert "data.meta_validation_size: 0" in error
    assert error.count("\n") == 1


def slow_down() -> None:
    """Let every step take a moment, so that a signal finds the run at work however fast the machine is."""
    run_step = Training.run_step

    def run_slowly(training: Training, *watch):
        time.sleep(0.02)
        return run_step(training, *watch)

    Training.run_step = run_slowly
    fork_workers()


def test_an_interrupted_run_resumes_to_the_same_student() -> None:
    """Stopped by Ctrl-C at whatever step it is, and gone on with: the same bits as a run that nobody disturbed."""
    words = ["distill", *TINY, "--train.epochs", "10", "--train.batch_size", "20", "--threads", "1"]
    words += ["--student.name", "tiny_cnn"]
    assert main([*words, "--run_dir", "whole"]) == 0
    command = Command([*words, "--run_dir", "cut"], prepare=slow_down)
    log = Path("cut/log.jsonl")
    command.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3)
    command.send_signal(signal.SIGINT)
    assert command.wait() == 130
    assert "go on with: lkd distill" in command.text
    assert command.text.rstrip().endswith("--resume auto")
    assert not Path("cut/student.safetensors").exists()
    assert main([*words, "--run_dir", "cut", "--resume", "auto"]) == 0
    whole, cut = (load_network(Path(name, "student.safetensors"))[0].state_dict() for name in ("whole", "cut"))
    assert all((whole[name] == cut[name]).all() for name in whole)


COMPARE = ["compare", *TINY, "--train.batch_size", "20", "--workers", "2", "--seeds", "2", "--resume", "auto"]
COMPARE += ["--methods", "{KD: kd, CE: cross_entropy}", "--students", "[{name: tiny_cnn}]"]


def test_a_comparison_that_is_stopped_with_its_workers_says_how_to_go_on() -> None:
    """As a batch system stops it: SIGTERM to every process of the job."""
    command = Command(COMPARE, group=True, prepare=slow_down)
    command.wait_for(lambda: list(Path("runs").glob("*/cells/*")))
    os.killpg(command.pid, signal.SIGTERM)
    assert command.wait() == 143, command.text
    assert "of 4 jobs are finished and kept; go on with: lkd compare" in command.text


def test_an_interrupted_comparison_keeps_its_finished_cells() -> None:
    command = Command([*COMPARE, "--run_dir", "c"], group=True, prepare=slow_down)
    command.wait_for(lambda: list(Path("c").glob("cells/*.json")))
    command.send_signal(signal.SIGINT)
    assert command.wait() == 130
    assert "go on with: lkd compare" in command.text
    kept = {path: path.stat().st_mtime_ns for path in Path("c").glob("cells/*.json")}
    assert 1 <= len(kept) < 4
    assert main([*COMPARE, "--run_dir", "c"]) == 0
    assert len(list(Path("c").glob("cells/*.json"))) == 4
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


# Words that lead a command line: recipe files, or the values of one field.


def test_leading_words_fill_a_list_or_a_single_value() -> None:
    odd = ["a b", "null", "[1, 2]", "3", "{x: 1}", 'q"uote']
    recipe = parse_recipe("report", [*odd, "--out", "o.html"])
    assert (recipe.runs, recipe.out) == (odd, "o.html")
    assert parse_recipe("report", ["--runs", "[a, b]"]).runs == ["a", "b"]
    assert parse_recipe("inspect", ["runs/x.lkd.safetensors"]).loss == "runs/x.lkd.safetensors"
    assert parse_recipe("inspect", ["{name: kd, weight: 0.5}"]).loss == {"name": "kd", "weight": 0.5}
    with pytest.raises(UserError, match="loss: one is taken, but 2 are given: a b"):
        parse_recipe("inspect", ["a", "b"])


def test_recipe_files_come_first_or_after_config() -> None:
    files = [Path("a.yaml"), Path("b.yaml"), Path("c.yaml")]
    assert split_files(["a.yaml", "--x", "1", "--config", "b.yaml", "--config=c.yaml"]) == (files, ["--x", "1"])


def test_help_and_mistakes_speak_of_them(capsys) -> None:
    for command, words in (("report", "RUN ..."), ("inspect", "LOSS")):
        assert main([command, "--help"]) == 0
        assert f"usage: lkd {command} {words} [--key value ...]" in capsys.readouterr().out
    assert main(["report", "--out", "o.html", "a"]) == 2
    assert "'a' is not an option, nor a value of one; files and folders go before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--data.label_noise 2", "data.label_noise: 2 is not a number >=0 and <=1"),
        ("--train.epochs 0", "train.epochs: 0 is not a whole number >0"),
        ("--train.epochs 1.5", "train.epochs: '1.5'"),
        ("--train.momentum nan", "train.momentum: nan"),
        ("--train.milestones [3,0]", "train.milestones: 0"),
        ("--teacher.image_size 4", "teacher.image_size: 4 is not a whole number 0 or >=8"),
    ],
)
def test_a_number_out_of_range_is_one_line_and_code_2(words: str, named: str, capsys) -> None:
    assert main(["distill", *words.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"lkd: error: {named}")
    assert "\n" not in error


def test_plain_values_are_checked_as_the_command_line_is() -> None:
    train = make_recipe(TrainRecipe, {"learning_rate": 1, "epochs": 2}, "train")
    assert (train.learning_rate, type(train.learning_rate), type(train.epochs)) == (1.0, float, int)
    assert make_recipe(DistillRecipe, {"train": {"epochs": 3}, "balance": None}).train.epochs == 3
    for values, named in (
        ({"learning_rate": -1}, "train.learning_rate: -1"),
        ({"epochs": True}, "train.epochs: True"),
        ({"epochs": "3"}, "train.epochs: '3'"),
        ({"epoch": 3}, "'train.epoch'; nearest: train.epochs"),
        ({"schedule": 3}, "train.schedule: .*3"),
    ):
        with pytest.raises(UserError, match=named):
            make_recipe(TrainRecipe, values, "train")
