"""A run that is killed at random moments ends in the weights of one that is left alone.

`benchmarks/kill_resume.py` does this twenty times to the command itself; here the process is forked
from this one, which has paid for the imports.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kd import distill
from kd.engine.checkpoint import load_checkpoint
from kd.runs.read import read_scalars

pytestmark = pytest.mark.slow

KILLS = 3


def _train(flags: list[str]) -> None:
    os._exit(distill.main(flags))


def _killed_after(flags: list[str], seconds: float) -> bool:
    """Run until done, or kill the process and its workers after a time; whether it was killed."""
    process = multiprocessing.get_context("fork").Process(target=_in_group, args=(flags,))
    process.start()
    process.join(timeout=seconds)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return False
    assert process.pid is not None
    os.killpg(process.pid, 9)
    process.join()
    return True


def _in_group(flags: list[str]) -> None:
    os.setpgid(0, 0)  # its workers die with it
    _train(flags)


@pytest.fixture
def flags(small_data: list[str], small_teacher: Path) -> Iterator[list[str]]:
    settings = [
        "student={name: shufflenet_v2_x0_5, options: {stride: 16, dropout: 0.2}}",
        "train={epochs: 2, batch_size: 4, ema: 0.9, checkpoint_every: 1, evaluate_every: 1}",
        "train.log_every=1",
        "train.images=0",
        "data.augment={flip: 0.5, jitter: 0.2}",
        "data.workers=1",
        "data.labelled=0.5",
        "data.repeat_labelled=1",
        "variants=[distilled]",
        "seeds=[0]",
    ]
    chosen = [text for setting in settings for text in ("--set", setting)]
    yield ["--student", "resnet18", "--teacher", str(small_teacher), *small_data, *chosen]


def test_kills_at_random_moments_change_no_bit(flags: list[str], tmp_path: Path) -> None:
    alone, killed = (tmp_path / name / "seed0" / "distilled" for name in ("alone", "killed"))
    started = time.monotonic()
    assert not _killed_after([*flags, "--out", str(tmp_path / "alone")], 120)
    whole = time.monotonic() - started
    moments = random.Random(3)
    kills, resumed = 0, [*flags, "--out", str(tmp_path / "killed"), "--resume"]
    while kills < KILLS:
        if not _killed_after(resumed, whole * moments.uniform(0.3, 0.8)):
            break  # it was done before
        kills += 1
    assert kills
    assert not _killed_after(resumed, 120)
    _, _, ours = load_checkpoint(killed / "last.pt")
    _, _, theirs = load_checkpoint(alone / "last.pt")
    for part in ("model", "ema"):
        for name, tensor in ours[part].items():
            assert torch.equal(tensor, theirs[part][name]), (part, name)
    files = [folder / "model.safetensors" for folder in (alone, killed)]
    assert len({file.read_bytes()[-1000:] for file in files}) == 1
    curves, expected = read_scalars(killed), read_scalars(alone)
    assert dict(curves["loss/total"]) == dict(expected["loss/total"])
    assert dict(curves["eval/nll"]) == dict(expected["eval/nll"])
    assert not [path for path in killed.iterdir() if path.name.endswith(".partial")]
