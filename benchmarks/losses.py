"""Compare the losses with straightforward implementations of their formulas.

pair_wise       65 x 65 nodes, 512 channels, no pooling, forward and backward: time and peak memory
imitation_mask  8 images of 20 boxes, 38 x 57 x 9 anchors, against box_iou in a loop over boxes;
                then a five-level pyramid at 800 x 1333: peak memory
pixel_wise      8 x 19 x 512 x 512, forward and backward: peak memory in units of score maps; on a
                GPU, with torch.compile, bandwidth as a fraction of a copy's

The two sides of a pair alternate. The result is the median of paired ratios.

    python benchmarks/losses.py [--pairs 5] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also when run as a file

from benchmarks._measure import Work, peak_memory
from kd.losses import anchor_grid, imitation_mask, pair_wise, pixel_wise

MIB = 2**20


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Work, device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def ratio(ours: Work, theirs: Work, device: torch.device, pairs: int) -> tuple[float, float]:
    """Return the median seconds of ours, and the median of ours / theirs."""
    ours()
    theirs()
    times = [(seconds(ours, device), seconds(theirs, device)) for _ in range(pairs)]
    return statistics.median(a for a, _ in times), statistics.median(a / b for a, b in times)


def plain_pair_wise(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the paper's formula directly, with two node-by-node matrices."""
    affinities = []
    for features in (student, teacher):
        nodes = F.normalize(features.flatten(2), dim=1)
        affinities.append(nodes.transpose(1, 2) @ nodes)
    places = student.shape[2] * student.shape[3]
    return (affinities[0] - affinities[1]).square().sum() / (places**2 * len(student))


def trained(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Work:
    """Return a function that runs forward and backward and discards the gradient."""

    def work() -> None:
        loss(student, teacher).backward()
        student.grad = None

    return work


def bench_pair_wise(device: torch.device, pairs: int) -> list[str]:
    student = torch.randn(1, 512, 65, 65, device=device, requires_grad=True)
    teacher = torch.randn(1, 512, 65, 65, device=device)
    ours = trained(lambda s, t: pair_wise(s, t, kernel=1), student, teacher)
    plain = trained(plain_pair_wise, student, teacher)
    took, times = ratio(ours, plain, device, pairs)
    memory = peak_memory(ours, device) / peak_memory(plain, device)
    with torch.no_grad():
        value, expected = pair_wise(student, teacher, kernel=1), plain_pair_wise(student, teacher)
    off = abs(value.item() / expected.item() - 1)
    return [
        f"pair_wise, 65 x 65 nodes, 512 channels: {took * 1e3:.0f} ms, {times:.2f} of the plain "
        f"formula's time, {memory:.2f} of its peak memory (goals 0.35), value off by {off:.1e}"
    ]


def looped_mask(boxes: list[Tensor], anchors: Tensor) -> Tensor:
    """Compute the mask in a loop over boxes, with torchvision's box_iou."""
    masks = []
    flat = anchors.flatten(0, 2)
    for own in boxes:
        mask = anchors.new_zeros(anchors.shape[:2], dtype=torch.bool)
        for box in own:
            iou = box_iou(box[None], flat).view(anchors.shape[:3])
            mask |= (iou > 0.5 * iou.max()).any(dim=-1)
        masks.append(mask)
    return torch.stack(masks)


def random_boxes(count: int, width: float, height: float) -> Tensor:
    middles = torch.rand(count, 2) * torch.tensor([width, height])
    sides = torch.rand(count, 2) * 300 + 5
    return torch.cat([middles - sides / 2, middles + sides / 2], dim=1)


def bench_mask(device: torch.device, pairs: int) -> list[str]:
    shapes = [(16 * s / r**0.5, 16 * s * r**0.5) for s in (8, 16, 32) for r in (0.5, 1.0, 2.0)]
    anchors = anchor_grid(38, 57, stride=16.0, sides=shapes, device=device)
    boxes = [random_boxes(20, 912, 608).to(device) for _ in range(8)]
    took, times = ratio(
        lambda: imitation_mask(boxes, anchors), lambda: looped_mask(boxes, anchors), device, pairs
    )
    many = [random_boxes(50, 1333, 800).to(device) for _ in range(8)]
    levels = []
    for stride in (4, 8, 16, 32, 64):
        sides = [(scale * stride, scale * stride) for scale in (4.0, 5.0, 6.3)]
        size = -(-800 // stride), -(-1333 // stride)
        levels.append(anchor_grid(*size, stride=stride, sides=sides, device=device))
    memory = peak_memory(lambda: [imitation_mask(many, level) for level in levels], device)
    whole = seconds(lambda: [imitation_mask(many, level) for level in levels], device)
    return [
        f"imitation_mask, 8 x 20 boxes, 38 x 57 x 9 anchors: {took * 1e3:.1f} ms, {1 / times:.1f} "
        "times as fast as box_iou in a loop (goal 3; 10 on a GPU)",
        f"imitation_mask, 8 x 50 boxes, five levels at 800 x 1333: {whole * 1e3:.0f} ms, "
        f"{memory / MIB:.0f} MiB (goal < 1024)",
    ]


def bench_pixel_wise(device: torch.device, pairs: int) -> list[str]:
    shape = (8, 19, 512, 512)
    student = torch.randn(shape, device=device, requires_grad=True)
    teacher = torch.randn(shape, device=device)
    work = trained(pixel_wise, student, teacher)
    held = student.numel() * 4
    maps = peak_memory(work, device) / held
    took = statistics.median(seconds(work, device) for _ in range(pairs))
    lines = [
        f"pixel_wise, 8 x 19 x 512 x 512: {took * 1e3:.0f} ms forward and backward, {maps:.2f} "
        "score maps of memory beyond its inputs, the gradient's among them (goal 3)"
    ]
    if device.type == "cuda":
        compiled = trained(torch.compile(pixel_wise), student, teacher)
        copy = torch.empty_like(teacher)
        compiled()
        fast = statistics.median(seconds(compiled, device) for _ in range(4 * pairs))
        copying = statistics.median(
            seconds(lambda: copy.copy_(teacher), device) for _ in range(4 * pairs)
        )
        # Each map is read once forward and once backward; a copy reads one map and writes one.
        fraction = (4 * held / fast) / (2 * held / copying)
        lines.append(
            f"pixel_wise, compiled: {fast * 1e3:.2f} ms, {fraction:.0%} of a copy's bandwidth "
            "(goal 60 %)"
        )
    return lines


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    for bench in (bench_pair_wise, bench_mask, bench_pixel_wise):
        for line in bench(device, args.pairs):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
