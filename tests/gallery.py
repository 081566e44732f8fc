"""Small runs that many tests look at, made once a session."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from lkd.cli import main

TINY = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--train.epochs", "2"]
META = ["--meta.outer_steps", "3", "--meta.students_per_step", "2", "--meta.rollout_steps", "3"]
META += ["--meta.rollout_epochs", "1", "--meta.outer_batch_size", "50", "--meta.picture_every", "2"]
META += ["--meta.reuse_every", "2", "--meta.reuse_students", "1", "--meta.reuse_epochs", "1"]
POOL = ["--pool.students", "2", "--pool.snapshots", "3", "--pool.max_age", "1.0"]
COMPARED = ["--seeds", "2", "--workers", "1", "--methods", "{KD: kd, CE: cross_entropy}", "--train.epochs", "1"]
LOSS = "learned/loss.lkd.safetensors"
RUNS = {  # folder → the command that leaves it
    "learned": ["meta-train", *TINY, "--train.batch_size", "20", *META, *POOL],
    "student": ["distill", *TINY, "--loss", LOSS],
    "kd": ["distill", *TINY, "--loss", "{name: kd, temperature: 2}", "--seed", "3"],
    "comparison": ["compare", *TINY, *COMPARED],
}


def make_gallery(folder: Path) -> Path:
    """Make the runs in a folder, unless another process of the session has made them.

    Returns:
        The folder: a run directory for each of `RUNS`. Tests read it; what they change, they copy first.
    """
    with FileLock(folder.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            patch.chdir(folder)
            patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
            torch.set_num_threads(1)
            # A process starts slowly.
            patch.setattr("lkd.evaluation.comparison.compare.start_workers", lambda *_, **__: ThreadPoolExecutor(1))
            for name, words in RUNS.items():
                assert main([*words, "--run_dir", name]) == 0, name
            (folder / "done").touch()
    return folder
