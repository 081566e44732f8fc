"""Meta-training over many worlds: listed, drawn, shared out among processes, gone on with."""

import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lkd.config import MetaTrainRecipe
from lkd.config.meta_training import DrawRecipe
from lkd.config.parse import merge, parse_recipe
from lkd.config.worlds import draw_worlds, expand_worlds
from lkd.core.errors import UserError
from lkd.core.tensor_files import digest, load_checkpoint
from lkd.losses.learned.file import load_loss, read_provenance, save_loss
from lkd.meta_training.meta_train import meta_train
from lkd.models.build import build
from lkd.models.files import save_network
from lkd.tracking.run import open_run
from tests.lkd.meta_recipes import SMALL, run_recipe, tiny_recipe
from tests.lkd.test_configs import ROOT
from tests.lkd.test_data import write_fashion_mnist
from tests.lkd.test_resume import run
from tests.processes import META, POOL, TINY, start_job

WORLDS = {"clean": {}, "flipped": {"data": {"label_noise": 0.4}}, "bad": {"teacher": {"random_answers": 0.6}}}
WORLDS |= {"tiny": {"of": "flipped", "student": {"name": "tiny_cnn"}, "train": {"batch_size": 40}}}
LOSS = "{conditioning: [progress, state, answer, context, calibration, agreement, images_per_class, own_accuracy]}"
WORDS = ["meta-train", *TINY, *POOL, *META, "--pool.students", "1", "--worlds", json.dumps(WORLDS)]
WORDS += ["--meta.students_per_step", "0", "--meta.clip_each", "1", "--meta.exploding_norm", "0", "--meta.loss", LOSS]
WORDS += ["--meta.reference", "cross_entropy", "--meta.reuse_every", "4", "--meta.estimator", "first_order"]
WORDS += ["--train.epochs", "1"]


def expand(listed: dict, **draw):
    return expand_worlds(MetaTrainRecipe(worlds=listed, draw=DrawRecipe(**draw)))


def test_a_world_has_what_the_recipe_has_but_for_what_differs() -> None:
    recipe = MetaTrainRecipe(worlds=WORLDS)
    recipe.data.train_size = 123
    expanded = expand_worlds(recipe)
    assert list(expanded) == list(WORLDS)
    assert {world.data.train_size for world in expanded.values()} == {123}
    assert (expanded["tiny"].data.label_noise, expanded["tiny"].student.name) == (0.4, "tiny_cnn")
    assert expanded["tiny"].train.batch_size == 40
    assert expanded["flipped"].student.name == "small_cnn"
    assert expand_worlds(MetaTrainRecipe()) == {}


def test_worlds_are_drawn_within_their_ranges_and_of_the_seed_alone() -> None:
    values = {
        "data.label_noise": {"low": 0.1, "high": 0.6},
        "teacher.logit_scale": {"low": 0.25, "high": 4, "log": True},
    }
    values |= {"train.batch_size": {"low": 20, "high": 60}, "student.name": ["tiny_cnn", "small_cnn"]}
    drawn, *few = [
        list(expand({"a": {}}, worlds=count, seed=seed, values=values).values())[1:]
        for count, seed in ((16, 0), (3, 0), (3, 1))
    ]
    assert drawn[:3] == few[0] != few[1]
    noise = [world.data.label_noise for world in drawn]
    assert len(set(noise)) == 16
    assert min(noise) >= 0.1
    assert max(noise) <= 0.6
    assert sum(world.teacher.logit_scale < 1 for world in drawn) in range(3, 14), "not even in the logarithm"
    assert {world.student.name for world in drawn} == {"tiny_cnn", "small_cnn"}
    assert all(isinstance(world.train.batch_size, int) for world in drawn)
    draw = DrawRecipe(worlds=300, values={"train.epochs": {"low": 1, "high": 3}})
    counts = Counter(world["train"]["epochs"] for world in draw_worlds(draw, {}).values())
    assert all(75 < counts[epochs] < 125 for epochs in (1, 2, 3)), "whole numbers are not even"


@pytest.mark.parametrize(
    ("worlds", "draw", "message"),
    [
        ({"a": {"of": "b"}}, {}, "worlds.a.of: 'b' is not another world; there are a"),
        ({"a": {"of": "b"}, "b": {"of": "a"}}, {}, "is not another world"),
        ({"a": {"pool": {}}}, {}, "worlds.a: unknown key 'pool'; a world differs in data, teacher, student, train"),
        (
            {"a": {"data": {"label_nois": 1}}},
            {},
            "'worlds.a.data.label_nois'; nearest: worlds.a.data.label_noise",
        ),
        ({"a": 3}, {}, "worlds.a: 3 is not a mapping"),
        ({"a": {}}, {"worlds": 1, "of": ["c"]}, "draw.of: there is no world 'c'; there are a"),
        ({"a": {}}, {"worlds": 1, "values": {"data.label_noise": []}}, "draw.values.data.label_noise: nothing can be"),
        ({"a": {}}, {"worlds": 1, "values": {"train.epochs": {"low": 3, "high": 2}}}, "draw.values.train.epochs: noth"),
        ({"drawn-00": {}}, {"worlds": 1}, "worlds.drawn-00: a drawn world has this name too"),
        ({"a": {}}, {"worlds": 1, "values": {"seed": [1]}}, "worlds.drawn-00: unknown key 'seed'"),
    ],
)
def test_worlds_that_are_none_are_refused(worlds: dict, draw: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        expand(worlds, **draw)
    assert message in str(error.value)


def read_loop(run_dir: str) -> dict:
    return load_checkpoint(Path(run_dir, "checkpoints/000000004.safetensors"))["loop"]


def test_worlds_are_learned_in_by_one_process_or_two_that_are_killed_to_the_same_bits(unused_tcp_port: int) -> None:
    job = start_job([*WORDS, "--run_dir", "two"], unused_tcp_port)
    job[0].wait_for(lambda: list(Path("two/checkpoints").glob("000000002*")))
    for process in job:
        process.send_signal(signal.SIGKILL)
    run([*WORDS, "--run_dir", "one"])
    assert [process.wait() for process in job] == [-signal.SIGKILL] * 2, Path("output-0.txt").read_text()
    run([*WORDS, "--run_dir", "two", "--resume", "auto"])
    one, two = read_loop("one"), read_loop("two")
    assert digest([one["loss"], one["optimizer"]]) == digest([two["loss"], two["optimizer"]])
    row = one["history"][-1]
    assert row["world/flipped/hypergradient_norm"] > 0
    assert row["outer/hypergradient_norm"] <= 1, "each world's hypergradient was to be clipped"
    assert 0 < row["world/bad/weight"] < 1
    looks = [read_provenance(f"{name}/loss.lkd.safetensors")["reuse"] for name in ("one", "two")]
    assert looks[0] == looks[1]
    last = looks[0][-1]
    regrets = [last[f"world/{name}/regret"] for name in WORLDS]
    assert last["regret"] == pytest.approx(sum(regrets) / 4)


@pytest.mark.parametrize("teacher", [{"path": "nowhere.safetensors"}, {"classes": "0-4"}])
def test_a_world_that_does_not_fit_is_named_before_any_work(teacher, capsys) -> None:
    from lkd.cli import main

    worlds = {"good": {}, "wrong": {"teacher": teacher}}
    words = [*WORDS, "--worlds", json.dumps(worlds), "--pool.loss", "cross_entropy", "--run_dir", "r"]
    assert main(words) == 2
    assert "worlds.wrong: " in capsys.readouterr().err
    assert not list(Path("r").glob("pool/*"))


def test_the_recipe_of_the_universal_loss_runs() -> None:
    """On small parts of everything, with teachers that know nothing."""
    recipe = parse_recipe("meta-train", [str(ROOT / "configs/universal.yaml"), "--device", "cpu", "--run_dir", "r"])
    recipe.data.root = write_fashion_mnist(Path.cwd())
    labels = torch.arange(100).repeat(6).numpy()
    images = torch.randint(256, (600, 32, 32), dtype=torch.uint8).numpy()
    parts = {"train_images": images, "train_labels": labels, "test_images": images[:100], "test_labels": labels[:100]}
    np.savez(Path(recipe.data.root, "glyphs.npz"), **parts)
    assert len(expand_worlds(recipe)) == 43
    kinds = [*("clean", "mobile", "residual", "few-500", "augmented", "much", "long-tail", "by-student", "own")]
    kinds += ["glyphs", "glyphs-hard", "glyphs-weak", "glyphs-weak-hard"]
    recipe.worlds = {name: recipe.worlds[name] for name in kinds}
    recipe.draw.of = [name for name in recipe.draw.of if name in kinds]
    for path in {world.get("teacher", {}).get("path", "embedded") for world in recipe.worlds.values()} - {"embedded"}:
        architecture = {"name": "tiny_cnn", "num_classes": 100 if "glyphs" in path else 10, "in_chans": 1}
        Path(path).parent.mkdir(parents=True)
        save_network(Path(path), build(**architecture), architecture, {})
    for name, world in recipe.worlds.items():
        sizes = {"train_size": 100, "meta_validation_size": 400 if name.startswith("glyphs") else 60}
        recipe.worlds[name] = merge(world, {"data": sizes, "train": {"epochs": 1, "batch_size": 20}})
    recipe.draw.values["train.batch_size"] = [10, 20]
    recipe.draw.worlds = 2
    recipe.pool.students = recipe.pool.snapshots = 1
    recipe.pool.max_age = recipe.pool.gaussian_age = 0.0
    recipe.meta = replace(recipe.meta, outer_steps=1, rollout_steps=1, outer_batch_size=50, reuse_every=0)
    recipe.meta.students_per_step = 0
    with open_run(recipe, "meta-train", quiet=True) as run:
        path = meta_train(recipe, run)
    provenance = read_provenance(path)
    assert provenance["hypergradients"]["counted"] == len(recipe.worlds) + 2
    assert load_loss(path).reads_trust


def test_settings_are_those_of_the_worlds() -> None:
    """The recipe's own training is nobody's; an estimator is tried in each world before any pool is built."""
    recipe = tiny_recipe(SMALL, outer_steps=1, estimator="first_order", reuse_every=1, reuse_epochs=2)
    recipe.train.epochs, recipe.worlds = 1, {"a": {"train": {"epochs": 3}}, "b": {"train": {"epochs": 2}}}
    assert run_recipe(recipe).exists()
    recipe.run_dir, recipe.meta.estimator = "early", "higher"
    recipe.worlds["a"] = {"train": {"epochs": 3, "optimizer": "adamw", "learning_rate": 0.001}}
    with pytest.raises(UserError, match=r"meta\.estimator higher: .* SGD"):
        run_recipe(recipe)
    assert not Path("early/pool").exists()


def test_a_start_is_gone_on_from_and_kept_where_nothing_is_better() -> None:
    recipe = tiny_recipe(SMALL, outer_steps=1, learning_rate=0.0, loss={"hidden": 3})
    first = run_recipe(recipe)
    for rate, kept in ((0.0, True), (0.3, None)):
        run_dir = f"adapted-{rate}"
        path = run_recipe(
            tiny_recipe(SMALL, run_dir, outer_steps=1, reuse_every=1, learning_rate=rate, start=str(first))
        )
        before, after = load_loss(first).state_dict(), load_loss(path).state_dict()
        assert before.keys() == after.keys(), "the networks are those of the start"
        said = f"the start, {first}, is kept" in Path(run_dir, "output.txt").read_text()
        assert said == (digest(before) == digest(after))
        assert kept in (None, said)
        assert read_provenance(path)["learned"]
    before_learning = Path("before.lkd.safetensors")
    save_loss(before_learning, load_loss(first), {"learned": False})
    recipe = tiny_recipe(SMALL, "kept", outer_steps=1, reuse_every=1, learning_rate=0.0, start=str(before_learning))
    assert not read_provenance(run_recipe(recipe))["learned"], "nothing taught it, neither here nor before"
    with pytest.raises(UserError, match="nowhere"):
        run_recipe(tiny_recipe(SMALL, "wrong", start="nowhere.safetensors"))


def test_a_reference_that_diverges_is_no_reference() -> None:
    with pytest.raises(UserError, match=r"^meta.reference: its students diverged, .*: lower train.learning_rate"):
        run_recipe(tiny_recipe(SMALL, reuse_every=1, reference={"name": "dkd", "beta": 1e30}))
