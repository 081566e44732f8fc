"""The command line: `lkd COMMAND [RECIPE.yaml ...] [--key value ...]`."""

import difflib
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any

from lkd import __version__
from lkd.config.parse import COMMANDS, parse_recipe
from lkd.core.errors import BAD_PLACE, FULL_DISK, UserError, explain_failed_write
from lkd.core.plugins import import_plugins

SIDE_BY_SIDE = ("compare", "fidelity", "quickstart")  # commands that train in several processes


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 for a mistake that the user can mend; 130 after Ctrl-C; 143 after SIGTERM, where training was saved; 141
        where whoever reads what is printed has gone.
    """
    words = sys.argv[1:] if arguments is None else arguments
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # torch's own calls of it
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"lkd {__version__}")
        return 0
    code = run(words)
    return end_at_once(code) if code else code


def end_at_once(code: int) -> int:
    """Leave where NCCL still stands after an error (`join_processes`): to take it down is to wait; else the code."""
    distributed = sys.modules.get("lkd.core.distributed")
    if distributed and distributed.patient is not None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    return code


def run(words: list[str]) -> int:
    """Run a command, and say what is wrong in one line; the exit code of `main`."""
    try:
        code = run_command(words[0], words[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"lkd: error: {make_printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads what is printed has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
    if command in SIDE_BY_SIDE:
        from lkd.core.workers import preload_workers

        preload_workers("lkd.commands")
    import_plugins(getattr(recipe, "plugins", None))
    from lkd import commands
    from lkd.core.distributed import read_job
    from lkd.core.interrupt import Interrupted

    work: Callable[[Any], None] = getattr(commands, command.replace("-", "_"))
    try:
        work(recipe)
    except Interrupted as stopped:
        if read_job().rank == 0:
            print(f"lkd: {stopped}; go on with: lkd {shlex.join(add_resume(command, words))}", file=sys.stderr)
        return stopped.exit_code
    return 0


def add_resume(command: str, words: list[str]) -> list[str]:
    """The same command line with `--resume auto`, whatever it said of it."""
    kept = [word for word in words if not word.startswith("--resume=")]
    while "--resume" in kept:
        place = kept.index("--resume")
        kept[place : place + 2] = []
    return [command, *kept, "--resume", "auto"]


if __name__ == "__main__":
    sys.exit(main())
