"""Kill a training with `kill -9` at random times, resume it, and compare with an undisturbed run.

    python benchmarks/kill_resume.py [--kills 20] [--seed 0]

Each round starts `python -m kd.distill ... --resume` and kills it, including its workers, after a
random time. If the run finishes first, the next round starts a new one. Every finished run must
have exactly the weights of the undisturbed run: those of the last step, their average and the
exported file. The result is the number of kills whose run ended with the same weights.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from kd.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SCENES = ["data.generate={train: 64, val: 16, size: 64, seed: 0}", "data.size=32"]
TEACHER = [
    *SCENES,
    "teacher={name: cnn, options: {width: 4, downs: 3, patch: 1, region: false, hidden: 16}}",
    "train={epochs: 1, batch_size: 16, images: 0}",
]
STUDENT = [
    *SCENES,
    "data.workers=1",
    "data.augment={flip: 0.5, shift: 0.1, jitter: 0.3}",
    "data.labelled=0.5",
    "data.repeat_labelled=1",
    "student={name: shufflenet_v2_x0_5, options: {stride: 16, dropout: 0.2}}",
    "train={epochs: 6, batch_size: 8, ema: 0.95, checkpoint_every: 3, evaluate_every: 1}",
    "train.images=1",
    "variants=[distilled]",
    "seeds=[0]",
]


def start(module: str, flags: list[str], settings: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a separate process group."""
    sets = [text for setting in settings for text in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *flags, *sets],
            cwd=log.parent, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.wait() != 0:
        sys.stdout.write(log.read_text()[-3000:])
        raise SystemExit("a run failed without being killed")


def student(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    flags = ["--student", "resnet18", "--teacher", str(folder / "teacher"), "--out", str(out),
             "--resume"]  # fmt: skip
    return start("kd.distill", flags, STUDENT, folder / "log.txt")


def differences(one: Path, other: Path) -> list[str]:
    """Return the names of tensors that are not bitwise equal."""
    run = Path("seed0") / "distilled"
    ours, theirs = (load_checkpoint(place / run / "last.pt")[2] for place in (one, other))
    found = [
        f"{part}.{name}"
        for part in ("model", "ema")
        for name, tensor in ours[part].items()
        if not torch.equal(tensor, theirs[part][name])
    ]
    files = [load_file(place / run / "model.safetensors") for place in (one, other)]
    return found + [name for name in files[0] if not torch.equal(files[0][name], files[1][name])]


def steps_done(out: Path) -> str:
    checkpoint = out / "seed0" / "distilled" / "last.pt"
    if not checkpoint.is_file():
        return "before the first checkpoint"
    return f"checkpoint of step {load_checkpoint(checkpoint)[0].step} there"


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill the process and its workers; return False if it finished first."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def main() -> int:
    """Print a line per kill and a summary; return 1 if a run ended with other weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    log, alone = folder / "log.txt", folder / "alone"
    finish(start("kd.train_teacher", ["--teacher", "cnn", "--out", str(folder / "teacher")],
                 TEACHER, log), log)  # fmt: skip
    finish(student(folder, folder / "warm"), log)  # stores the posteriors
    started = time.monotonic()
    finish(student(folder, alone), log)
    whole = time.monotonic() - started
    sys.stdout.write(f"undisturbed: {whole:.1f} s\n")
    kills, same, runs = 0, 0, 0
    while kills < args.kills:
        out, own = folder / f"run{runs}", 0
        while kills + own < args.kills and own < 5:
            moment = whole * moments.uniform(0.3, 0.95)
            if not kill_after(student(folder, out), moment):
                break
            own += 1
            sys.stdout.write(f"kill {kills + own} after {moment:.1f} s, {steps_done(out)}\n")
            sys.stdout.flush()
        finish(student(folder, out), log)
        odd = differences(out, alone)
        kills, same, runs = kills + own, same + (0 if odd else own), runs + 1
        sys.stdout.write(f"run {runs}: {'same weights' if not odd else f'DIFFERENT: {odd[:3]}'}\n")
        shutil.rmtree(out)
    sys.stdout.write(f"{same}/{kills} kills ended in the undisturbed run's weights, bit for bit\n")
    shutil.rmtree(folder)
    return int(same != kills)


if __name__ == "__main__":
    raise SystemExit(main())
