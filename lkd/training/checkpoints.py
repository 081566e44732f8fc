"""The newest checkpoints of one training, and the steps between them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lkd.config.parts import TrainRecipe
from lkd.core.distributed import any_process, is_main, share_from_main
from lkd.core.errors import DamagedFileError, UserError
from lkd.core.files import refusing_malformed
from lkd.core.interrupt import Interrupted, StopRequest
from lkd.core.tensor_files import load_checkpoint, save_checkpoint
from lkd.training.training import Training, Watch

STEPS_BETWEEN_QUESTIONS = 10  # of all processes to each other whether one was asked to stop


class Checkpoints:
    """The newest checkpoints of a training, a file each; the main process alone writes and reads them.

    Args:
        folder: A folder of their own.
        recipe: How many are kept, and after how many steps the next one is due.
        say: Told what is wrong with a damaged one.
        shared: Whether the processes that have met share the training; else this one writes and reads by itself.
    """

    def __init__(self, folder: Path, recipe: TrainRecipe, say: Callable[[str], None], shared: bool = True) -> None:
        self.shared, self.writes = shared, is_main() or not shared
        self.folder, self.every, self.kept, self.say = folder, recipe.checkpoint_every, recipe.checkpoints_kept, say

    def list(self) -> "dict[int, Path]":
        """The checkpoints that there are, by step, the newest last."""
        return {int(path.stem): path for path in sorted(self.folder.glob("[0-9]*.safetensors"))}

    def save(self, step: int, tree: Any) -> None:
        """Write a checkpoint; the oldest beyond those that are kept go.

        So do those of later steps, which a run leaves that went on from an earlier one than the newest.
        """
        if not self.writes:
            return
        save_checkpoint(self.folder / f"{step:09d}.safetensors", tree)
        for left in self.folder.glob(".[0-9]*.safetensors.*"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
        files = self.list()
        earlier = [number for number in files if number <= step]
        for number in files.keys() - earlier[-self.kept :]:
            files[number].unlink()

    def load(self) -> Any:
        """What `read_newest` gives the main process. All processes must ask."""
        newest = self.read_newest() if self.writes else None
        return share_from_main(newest) if self.shared else newest

    def read_newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is not damaged; None if there are none, or it is the first one that is damaged."""
        files = self.list()
        only_first = len(files) == 1 < self.kept  # later there are always two
        for step, path in reversed(files.items()):
            try:
                tree = load_checkpoint(path)
                if isinstance(tree, dict):
                    return tree
                raise DamagedFileError(f"{path}: holds a {type(tree).__name__}, not what a training saves")
            except DamagedFileError as error:  # one of a newer format, or that cannot be read now, is good
                instead = (
                    "it was the first: begun anew"
                    if only_first
                    else f"the checkpoint before step {step} takes its place"
                )
                self.say(f"warning: {error}; it is left out, {instead}")
        if files and not only_first:
            raise UserError(f"{self.folder}: all {len(files)} checkpoints are damaged; delete the folder to start anew")
        return None

    def save_training(self, training: Training, **beside: Any) -> None:
        """Write a checkpoint of a training and what is kept beside it. All processes that share it must ask."""
        self.save(training.step, {"training": training.state_dict(), **beside})

    def resume_training(self, training: Training) -> dict[str, Any]:
        """Bring a training to its newest checkpoint; what was kept beside it. All processes that share it must ask."""
        saved = self.load()
        if saved is None:
            return {}
        with refusing_malformed(self.folder, "folder of checkpoints of this training"):
            training.load_state_dict(saved.pop("training"))
        return saved

    def remove(self) -> None:
        """Delete them: nobody will go on from here."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_steps(
    training: Training, end: int, stop: StopRequest, checkpoints: Checkpoints, watch: Watch | None = None, **beside: Any
) -> Iterator[dict[str, Tensor]]:
    """Train up to a step, saving it, with what is kept beside it, every so many steps.

    Yields:
        The loss's terms after every step.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    while training.step < end:
        stopped = bool(stop)
        if training.shared:  # the processes agree on it every so many steps
            asks = training.step % STEPS_BETWEEN_QUESTIONS == 0
            stopped = asks and any_process(stopped, training.batches.device)
        if stopped:
            checkpoints.save_training(training, **beside)
            raise Interrupted(f"stopped at step {training.step} of {training.total_steps}")
        yield training.run_step(watch)
        if training.step % checkpoints.every == 0 and training.step < end:
            checkpoints.save_training(training, **beside)
