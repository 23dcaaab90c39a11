"""Paired measurements of time and memory, shared by the benchmarks."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kd.config.recipes import Train
from kd.data.loader import to_device
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import modules_of
from kd.engine.loop import train_step
from kd.engine.state import Objective, Window
from kd.runs.build import make_accelerator
from kd.runs.setup import start_training

Work = Callable[[], object]
Batch = dict[str, Tensor]
Step = Callable[[Batch], None]


def resident(what: str) -> int:
    """Read VmRSS or VmHWM of this process in bytes (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def peak_memory(work: Work, device: torch.device) -> int:
    """Return the bytes that `work` needs at its peak, beyond the memory in use before it."""
    work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise freed memory is reused
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def seconds(step: Step, batch: Batch) -> float:
    started = time.perf_counter()
    step(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(name: str, first: Step, second: Step, batches: list[Batch], pairs: int) -> float:
    """Time two functions in turns and return the median of first / second."""
    for batch in batches[:2]:  # warm up caches, allocators and kernels
        first(batch)
        second(batch)
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        batch = batches[number % len(batches)]
        if number % 2:
            b, a = seconds(second, batch), seconds(first, batch)
        else:
            a, b = seconds(first, batch), seconds(second, batch)
        times.append((a, b))
    ratio = statistics.median(a / b for a, b in times)
    a, b = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    sys.stdout.write(f"{name:<44}{a:>9.1f} ms {b:>9.1f} ms   ratio {ratio:.3f}\n")
    return ratio


def engine_step(model: AdaptedStudent, objective: Objective, train: Train) -> Step:
    """Return a function that takes one step as `fit` does, without log lines."""
    accelerator = make_accelerator("fp32")
    critics = modules_of(objective.terms, trained="critic")
    training = start_training(accelerator, model, train, 100_000, critics)
    training.model.train()
    window = Window(accelerator)

    def step(batch: Batch) -> None:
        moved = to_device(batch, accelerator.device, channels_last=True)
        window.rate = training.rate
        window.take(*train_step(training, [moved], objective, objective.weights_at(0.5)))

    return step
