"""Measure CPU seconds and peak memory of commands that do not import torch.

python benchmarks/startup.py
"""

from __future__ import annotations

import os
import subprocess
import sys

COMMANDS = (
    "kd --help",
    "kd.train_teacher --help",
    "kd.distill --help",
    "kd.evaluate --help",
    "kd.compare --help",
    "kd.transfer --help",
    "kd.cache --help",
    "kd.imagine --help",
    "kd.rescore --help",
    "kd.data.prepare --help",
    "kd.data.scenes --help",
    "kd.distill --schema",
    "kd.distill --list",
    "kd.distill --student resnet18 --print-config",
    "kd.distill --student nosuch",
    "kd.distill --student resnet18 --set student.name=resnet19",
    "kd.distill --student resnet18 --set train.epohcs=3",
)


def measure(command: str) -> tuple[float, float]:
    """Measure CPU seconds and peak memory in MB of one run of `python -m COMMAND`."""
    ran = subprocess.Popen(
        [sys.executable, "-m", *command.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, _, used = os.wait4(ran.pid, 0)
    ran.returncode = 0  # waited for already
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print a row per command, the fastest of three runs."""
    sys.stdout.write(f"{'python -m ...':<60} {'CPU s':>6} {'MB':>5}\n")
    for command in COMMANDS:
        seconds, megabytes = min(measure(command) for _ in range(3))
        sys.stdout.write(f"{command:<60} {seconds:6.2f} {megabytes:5.0f}\n")


if __name__ == "__main__":
    main()
