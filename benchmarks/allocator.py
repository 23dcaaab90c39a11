"""Benchmark reusing freed memory on a CPU (`kd.utils.malloc`): time and peak memory.

Inference of MobileNetV2 and training steps of ResNet-18 run in separate processes in turn, with
glibc's defaults and with the setting of kd's commands. CPU time is compared, including the
system's, because most of the loss is memory that the system sets to zero.

    python benchmarks/allocator.py [--size 384] [--batch-size 16] [--steps 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from kd.utils.malloc import keep_freed_memory

Step = Callable[[], object]


def answering(images: torch.Tensor) -> Step:
    """Return a function that runs MobileNetV2 as for computing posteriors."""
    network = mobilenet_v2().eval().to(memory_format=torch.channels_last).requires_grad_(False)
    return lambda: network(images)


def training(images: torch.Tensor) -> Step:
    """Return a function that trains ResNet-18 for one step."""
    network = resnet18(num_classes=80).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    labels = torch.randint(80, (len(images),))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


WORK = {"answering": answering, "training": training}


def measure_here(options: argparse.Namespace) -> None:
    """Print CPU seconds per step and peak memory, for the parent process."""
    if options.kept and not keep_freed_memory():
        raise SystemExit("this C library is not glibc, or glibc is tuned already")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    images = torch.rand(options.batch_size, 3, options.size, options.size)
    step = WORK[options.work](images.to(memory_format=torch.channels_last))
    for _ in range(2):
        step()
    busy = time.process_time()
    for _ in range(options.steps):
        step()
    busy = (time.process_time() - busy) / options.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"{busy} {peak}\n")


def measure(options: argparse.Namespace, work: str, kept: bool) -> tuple[float, float]:
    """Measure in a separate process."""
    names = ("size", "batch_size", "steps", "threads")
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, "--work", work, *flags, *(["--kept"] if kept else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    busy, peak = map(float, done.stdout.split())
    return busy, peak


def main() -> int:
    """Print one line per kind of work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--kept", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        measure_here(options)
        return 0
    for work in WORK:
        rounds = [
            (measure(options, work, kept=False), measure(options, work, kept=True))
            for _ in range(options.rounds)
        ]
        ratio = statistics.median(before[0] / after[0] for before, after in rounds)
        busy = [statistics.median(pair[side][0] for pair in rounds) for side in (0, 1)]
        peak = [statistics.median(pair[side][1] for pair in rounds) for side in (0, 1)]
        sys.stdout.write(
            f"{work:<10} {busy[0]:.2f} CPU s a step as glibc comes, {busy[1]:.2f} with freed "
            f"memory kept: {ratio:.2f} times as fast; peak {peak[0]:.0f} and {peak[1]:.0f} MiB\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
