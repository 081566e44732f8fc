"""The command line: `lkd COMMAND [RECIPE.yaml ...] [--key value ...]`."""

import difflib
import sys
from collections.abc import Callable
from typing import Any

from lkd import __version__, config
from lkd.command_words import complete_switches, explain, known_keys, name_leading, read_recipes, split_config, usage
from lkd.errors import BAD_PLACE, FULL_DISK, UserError, explain_failed_write

# Command → (recipe, what to do). The work is imported when it starts: `--help` must not wait for torch.
COMMANDS: dict[str, tuple[type, str]] = {
    "quickstart": (
        config.QuickstartRecipe,
        "learn a loss on embedded images, reuse it, compare it: the whole path in minutes",
    ),
    "plan": (config.PlanRecipe, "what a recipe of distill or meta-train will take: hours, memory, data"),
    "teacher": (config.TrainTeacherRecipe, "train a teacher"),
    "pool": (config.PoolRecipe, "keep students at many ages, to start rollouts from"),
    "fidelity": (config.FidelityRecipe, "do short rollouts rank losses as full trainings do? ask before meta-train"),
    "meta-train": (config.MetaTrainRecipe, "learn a distillation loss and save it as one file"),
    "inspect": (config.InspectRecipe, "what a learned or a hand-made loss does, without training: report and picture"),
    "distill": (config.DistillRecipe, "train a student with a learned or a hand-made loss"),
    "influence": (config.InfluenceRecipe, "which training images help a network, and which harm it"),
    "evaluate": (config.EvaluateRecipe, "measure a teacher's or a student's file"),
    "cache": (config.CacheRecipe, "keep a teacher's answers, for trainings that do not ask it"),
    "pack": (config.PackRecipe, "decode all images of a data set once, for faster loading"),
    "variance": (config.VarianceRecipe, "how noisy a student's gradient is for each share of the teacher"),
    "export": (config.ExportRecipe, "write a student for timm, ONNX, torch.export; each file is read back"),
    "push": (config.PushRecipe, "put a learned loss on the Hugging Face Hub or into W&B's artifacts"),
    "pull": (config.PullRecipe, "fetch a learned loss from there"),
    "compare": (config.CompareRecipe, "losses × students × paired seeds: a table, CSV and a picture"),
    "report": (config.ReportRecipe, "one HTML page about runs: results, curves, learned losses, settings, lineage"),
    "dashboard": (config.DashboardRecipe, "a W&B workspace for a project's runs, or a report of a comparison"),
}

# Command → the field whose values are the words before the options: one, or a list. Elsewhere these are recipe files.
POSITIONAL = {"inspect": "loss", "push": "loss", "pull": "loss", "report": "runs"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for a mistake that the user can mend; 130 after Ctrl-C; 143 after SIGTERM, where training was saved.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"lkd {__version__}")
        return 0
    try:
        return run_command(words[0], words[1:])
    except UserError as error:
        print(f"lkd: error: {make_printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in FULL_DISK:
            line = explain_failed_write(error.filename or "run_dir", error)
        elif error.errno in BAD_PLACE and error.filename:
            line = f"{error.filename}: cannot be used: {error.strerror}"
        else:
            raise
        print("lkd: error:", make_printable(line), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lkd: interrupted", file=sys.stderr)
        return 130


def make_printable(text: str) -> str:
    """A message as one line that steers no terminal: what a file holds may be in it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def overview() -> str:
    """What `lkd --help` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lkd COMMAND [RECIPE.yaml ...] [--key value ...]",
            "",
            "Knowledge distillation whose loss is learned.",
            "",
            *lines,
            "",
            "`lkd COMMAND --help` lists a command's options.",
            "Values on the command line win over recipe files, later files over earlier ones.",
        ]
    )


def run_command(command: str, words: list[str]) -> int:
    """Parse one command's recipe and do its work."""
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1) or list(COMMANDS)
        raise UserError(f"unknown command {command!r}; nearest: {', '.join(near)}")
    recipe = parse_recipe(command, words)
    if recipe is None:
        return 0
    from lkd import commands
    from lkd.interrupt import Interrupted
    from lkd.processes import read_job

    work: Callable[[Any], None] = getattr(commands, command.replace("-", "_"))
    try:
        work(recipe)
    except Interrupted as stopped:
        if read_job().rank == 0:
            print(f"lkd: {stopped}; go on with: lkd {' '.join(add_resume(command, words))}", file=sys.stderr)
        return stopped.exit_code
    return 0


def add_resume(command: str, words: list[str]) -> list[str]:
    """The same command line with `--resume auto`."""
    return [command, *words] if "--resume" in words else [command, *words, "--resume", "auto"]


def parse_recipe(command: str, words: list[str]) -> Any:
    """Turn recipe files and overrides into the command's dataclass; None if only help was asked for.

    Raises:
        UserError: If a file cannot be read, a key is unknown or a value is of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    recipe, field = COMMANDS[command][0], POSITIONAL.get(command)
    set_parsing_settings(  # a recipe is data: no value of it may name code that is imported or made
        import_path_denylist=["*"], import_path_allowlist=["lkd.config"], instantiate_subclass_spec_in_any=False
    )
    parser = ArgumentParser(
        prog=f"lkd {command}",
        usage=f"lkd {command} {usage(recipe, field)} [--key value ...]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A recipe file; the same as naming it first.")
    parser.add_class_arguments(recipe)
    words = split_config(name_leading(words, recipe, field))
    expanded = complete_switches(read_recipes(words), {f"--{key}" for key in known_keys(parser, bool)})
    try:
        parsed = parser.instantiate(parser.parse_args(expanded))
    except ArgumentError as error:
        raise UserError(explain(str(error), known_keys(parser))) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the recipe has a value that cannot be used ({type(error).__name__}: {error})") from error
    except SystemExit:
        return None
    values = {key: value for key, value in vars(parsed).items() if key != "config"}
    return recipe(**values)


if __name__ == "__main__":
    sys.exit(main())
