"""The faults: what each is, what is promised, where it applies, and how it is brought about."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.faults import injections
from tests.faults.injections import Injection, Moment

ALL = ("pool", "meta-train", "distill", "compare", "cache")
TRAININGS = ("pool", "meta-train", "distill", "compare")


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        what: What happens.
        promise: What a user may rely on.
        commands: Where it applies.
        elsewhere: Why not at the other commands.
        inject: From a moment to what is done to the process; None if the fault comes from outside.
        codes: Exit codes that keep the promise.
        says: What the run must have said, as a regular expression.
        files: Whether it needs images in files.
        exact: Whether the result is that of the undisturbed run to the bit; else that of the run with `reference`.
        reference: Another fault that must have the same result when it comes at the same call.
        words: What the command line needs besides, in the disturbed run.
    """

    what: str
    promise: str
    commands: tuple[str, ...] = ALL
    elsewhere: str = ""
    inject: Callable[[Moment], Injection] | None = None
    codes: tuple[int, ...] = (2,)
    says: str = "^lkd: error: "
    files: bool = False
    exact: bool = True
    reference: str = ""
    words: tuple[str, ...] = ()


SAME = "; `--resume auto` ends with the same bits"
IN_TEACHER = "one logit of the teacher is not finite"
NO_ROLLOUTS = "they have no rollouts"
STOPPED_BY_DAMAGE: dict[str, Any] = {"codes": (-9, 2), "says": ""}  # 2: of a comparison whose worker has died
SKIPPED: dict[str, Any] = {
    "promise": "the next image of the order takes its place, the log names it, the run goes on",
    **{"codes": (0,), "says": "skipped", "files": True, "exact": False},
}
NOT_FINITE: dict[str, Any] = {
    "says": "^lkd: error: .*not finite",
    "commands": ("pool", "distill", "compare", "cache"),
    "elsewhere": "pool and looks are trained as in `pool`; rollouts: below",
}
AS_IF_NOT_DRAWN = "that student's hypergradient is left out and counted, as if the student had not been drawn"
LEFT_OUT: dict[str, Any] = {
    **{"commands": ("meta-train",), "codes": (0,), "says": "1 of 8 hypergradients were left out"},
    **{"exact": False, "reference": "not finite: hypergradient"},
}

FAULTS = {
    "kill": Fault("SIGKILL", f"at most the steps since the last checkpoint are lost{SAME}", codes=(-9,), says=""),
    "terminate": Fault(
        "SIGTERM",
        f"exit 143 after a checkpoint at the next step (while preparing, and in `cache`: at once){SAME}",
        codes=(143, -15),
        says="",
    ),
    "disk full": Fault(
        "no space left in the middle of a write",
        f"exit 2 with one line that names the file; earlier files stay{SAME}",
        inject=lambda moment: partial(injections.fill_disk, moment),
        says="^lkd: error: .*No space left on device",
    ),
    "truncated": Fault(
        "a checkpoint or result arrives truncated, and the machine dies",
        f"it is found damaged, named, and the newest good one takes its place{SAME}",
        inject=lambda moment: partial(injections.damage_file, moment, flip=False),
        **STOPPED_BY_DAMAGE,
    ),
    "flipped bits": Fault(
        "a checkpoint or result arrives with flipped bits, and the machine dies",
        f"it is found by its checksum, named, and the newest good one takes its place{SAME}",
        inject=lambda moment: partial(injections.damage_file, moment, flip=True),
        **STOPPED_BY_DAMAGE,
    ),
    "worker killed": Fault(
        "a worker process is killed",
        f"exit 2 with one line; finished trainings are kept{SAME}",
        commands=("compare",),
        elsewhere="they have no worker processes",
    ),
    "decoder dies": Fault(
        "a thread that decodes images runs out of memory",
        f"exit 2 with one line that names the image{SAME}",
        inject=lambda moment: partial(injections.fail_decoder, moment),
        files=True,
        says="^lkd: error: .*data: ",
    ),
    "image damaged": Fault("an image file is overwritten while the run reads it", **SKIPPED),
    "image gone": Fault("an image file vanishes", **SKIPPED),
    "read hangs": Fault(
        "a read never returns",
        f"exit 2 with one line that names the image, `data.read_timeout` seconds later{SAME}",
        inject=lambda moment: partial(injections.hang_decoder, moment),
        files=True,
        says=r"^lkd: error: data\.read_timeout: ",
    ),
    "not finite: batch": Fault(
        "one pixel of a batch is NaN or infinite",
        f"exit 2 with one line that names the step and the images{SAME}",
        inject=lambda moment: partial(injections.spoil_batch, moment, in_rollouts=False),
        **NOT_FINITE,
    ),
    "not finite: teacher": Fault(
        IN_TEACHER,
        f"exit 2 with one line that names the step and the teacher{SAME}",
        inject=lambda moment: partial(injections.spoil_teacher, moment, in_rollouts=False),
        **NOT_FINITE,
    ),
    "not finite: hypergradient": Fault(
        "a hypergradient is NaN",
        "it is left out and counted; loss and outer optimiser are as if that student had not been drawn",
        inject=lambda moment: partial(injections.spoil_hypergradient, moment),
        elsewhere="they have no hypergradient",
        **LEFT_OUT,
    ),
    "not finite: rollout's batch": Fault(
        "one pixel of a batch of a rollout is NaN or infinite",
        AS_IF_NOT_DRAWN,
        inject=lambda moment: partial(injections.spoil_batch, moment, in_rollouts=True),
        elsewhere=NO_ROLLOUTS,
        **LEFT_OUT,
    ),
    "not finite: rollout's teacher": Fault(
        f"{IN_TEACHER} in a rollout",
        AS_IF_NOT_DRAWN,
        inject=lambda moment: partial(injections.spoil_teacher, moment, in_rollouts=True),
        elsewhere=NO_ROLLOUTS,
        **LEFT_OUT,
    ),
    "memory: rollout": Fault(
        "a rollout finds no memory left",
        f"exit 2 with one line that says what to lower{SAME}",
        inject=lambda moment: partial(injections.exhaust_memory, moment, in_rollouts=True),
        commands=("meta-train",),
        elsewhere=NO_ROLLOUTS,
        says="^lkd: error: .*out of memory.*meta.rollout_steps",
    ),
    "memory: training": Fault(
        "a training's step finds no memory left",
        f"exit 2 with one line that says what to lower{SAME}",
        inject=lambda moment: partial(injections.exhaust_memory, moment, in_rollouts=False),
        commands=TRAININGS,
        elsewhere="it trains nothing",
        says="^lkd: error: .*out of memory.*train.batch_size",
    ),
    "W&B gone": Fault(
        "the server that W&B sends to is killed",
        "the run goes on and ends well; its log and results are whole",
        inject=lambda moment: partial(injections.lose_wandb, moment),
        commands=TRAININGS,
        elsewhere="it records no run",
        codes=(0,),
        says="",
        words=("--wandb.mode", "online"),
    ),
    "process dies": Fault(
        "one of two processes of a job is killed",
        f"the other ends within a minute, exit 2 with one line{SAME} (of the undisturbed job)",
        commands=("pool", "meta-train", "distill"),
        elsewhere="compare is one process; those of `cache` do not talk: the other finishes its part",
        says="^lkd: error: torchrun: .*lost another process",
    ),
}
