"""Recipe files that build on others; schedules with milestones."""

import pytest
import torch

from lkd.cli import main
from lkd.config import TrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.training.optimizer import build_scheduler


def test_bases_are_merged_under_the_files_own_keys(tmp_path) -> None:
    (tmp_path / "pair").mkdir()
    (tmp_path / "all.yaml").write_text("seed: 1\ntrain: {epochs: 3, learning_rate: 5e-4, batch_size: 9}\n")
    (tmp_path / "loss.yaml").write_text("seed: 2\nloss: {name: kd, weight: 0.3}\n")
    (tmp_path / "pair" / "pair.yaml").write_text("base: ../all.yaml\ntrain: {epochs: 4}\n")
    top = tmp_path / "pair" / "top.yaml"
    top.write_text("base: [pair.yaml, ../loss.yaml]\nloss: {weight: 0.5}\ntrain: {batch_size: 8}\n")
    for words in ([str(top)], ["--config", str(top)]):
        recipe = parse_recipe("distill", [*words, "--train.momentum", "0.8"])
        train = recipe.train
        assert (train.epochs, train.learning_rate, train.batch_size, train.momentum) == (4, 5e-4, 8, 0.8)
        assert recipe.loss == {"name": "kd", "weight": 0.5}
        assert recipe.seed == 2


def test_the_packages_recipes_are_found_from_everywhere_and_a_file_of_ones_own_comes_first(tmp_path) -> None:
    words = ["configs/embedded/adapt.yaml"]
    assert parse_recipe("meta-train", words).meta.start == "universal"
    (tmp_path / "configs" / "embedded").mkdir(parents=True)
    (tmp_path / "configs" / "embedded" / "adapt.yaml").write_text("meta: {start: mine}")
    assert parse_recipe("meta-train", words).meta.start == "mine"


def test_what_a_file_adds_to_another_reaches_that_one_alone_in_either_order(tmp_path) -> None:
    (tmp_path / "methods").mkdir()
    pair, base, mine = (tmp_path / name for name in ("pair.yaml", "base.yaml", "mine.yaml"))
    dkd, kd = (tmp_path / "methods" / name for name in ("dkd.yaml", "kd.yaml"))
    base.write_text("with: {methods/dkd.yaml: {seed: 5, loss: {alpha: 2.0}}}")
    pair.write_text("base: base.yaml\npair: a-b\nwith: {methods/dkd.yaml: {loss: {beta: 6.0}}}")
    dkd.write_text("loss: {name: dkd, beta: 8.0}\nrun_dir: 'runs/{pair}/dkd'")
    kd.write_text("loss: {name: kd}\nrun_dir: 'runs/{pair}/kd'\nwandb: {tags: ['{pair}', x]}")
    mine.write_text("base: [pair.yaml, methods/dkd.yaml]\nloss: {beta: 3.0}\npair: c-d")
    for files in ([pair, dkd], [dkd, pair]):
        recipe = parse_recipe("distill", [str(file) for file in files])
        assert recipe.loss == {"name": "dkd", "alpha": 2.0, "beta": 6.0}
        assert (recipe.run_dir, recipe.seed) == ("runs/a-b/dkd", 5)
    recipe = parse_recipe("distill", [str(pair), str(kd)])
    assert (recipe.loss, recipe.seed, recipe.run_dir) == ({"name": "kd"}, 0, "runs/a-b/kd")
    assert recipe.wandb.tags == ["a-b", "x"]
    recipe = parse_recipe("distill", [str(mine)])
    assert (recipe.loss["beta"], recipe.run_dir) == (3.0, "runs/c-d/dkd")
    assert parse_recipe("distill", [str(pair), str(dkd), "--loss.beta", "4"]).loss["beta"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: other.yaml", "r.yaml is a cycle"),
        ("base: missing.yaml", "missing.yaml: cannot be read: No such file"),
        ("base: {a: 1}", "is not a file name or a list of file names"),
        ("base: .", "cannot be read: Is a directory"),
        ("- 1", "is not a mapping"),
        ("a: [", "is not YAML"),
        ("with: [other.yaml]", "r.yaml: with: ['other.yaml'] is not a mapping of recipe files"),
        ("with: {other.yaml: 1}", "r.yaml: with: {'other.yaml': 1} is not a mapping of recipe files"),
        ("with: {missing.yaml: {seed: 1}}", "r.yaml: with: there is no file"),
        ("pair: [a]", "pair: ['a'] is not a name"),
        ("wandb: {tags: ['of {pair}']}", "r.yaml: wandb: tags: 'of {pair}' is for a pair"),
    ],
)
def test_bases_that_cannot_be_used_are_one_line(text: str, message: str, tmp_path, capsys) -> None:
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("base: r.yaml")
    assert main(["distill", str(tmp_path / "r.yaml")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("steps_per_epoch", [1, 3])
def test_milestones_are_torchs(steps_per_epoch: int) -> None:
    recipe = TrainRecipe(epochs=10, learning_rate=1.0, schedule="multistep", milestones=[3, 6, 9], decay_rate=0.1)
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0) for _ in range(2))
    scheduler = build_scheduler(ours, recipe, steps_per_epoch)
    oracle = torch.optim.lr_scheduler.MultiStepLR(theirs, [m * steps_per_epoch for m in (3, 6, 9)], 0.1)
    for step in range(10 * steps_per_epoch):
        scheduler.step_update(step)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"]), step
        theirs.step()
        oracle.step()
    for schedule, milestones in (("cosine", [3]), ("multistep", []), ("multistep", [5, 3]), ("multistep", [0, 3])):
        with pytest.raises(UserError, match="milestones"):
            build_scheduler(ours, TrainRecipe(schedule=schedule, milestones=milestones), 2)
