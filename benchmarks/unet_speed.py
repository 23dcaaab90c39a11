"""Compare the U-Net teacher at 384 x 384 with a plain implementation of the same network.

Both have the same weights (width 64, transposed convolutions, 31 M parameters) and the same logits.
`plain` is float32 in torch's default layout, in evaluation mode, without gradients. The others add
one optimisation after another:

channels_last   channels innermost, which the convolutions of oneDNN and cuDNN prefer
folded          batch norms folded into convolutions (kd.nn.inference)
compiled        torch.compile of `folded`, with frozen weights (--compile: takes minutes)
bf16            bfloat16 autocast, if the hardware supports it natively
int8            8-bit integers (kd.nn.inference), on a CPU; changes the logits slightly, see
                benchmarks/int8_teacher.py for a trained teacher's posteriors

The variants take turns. The table shows the best round of each in wall time and in CPU time of the
process (which other load on the machine affects less), and the peak memory that each adds.

    python benchmarks/unet_speed.py [--size 384] [--batch-size 1] [--rounds 3] [--compile]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from kd.nn.inference import for_answers, in_int8
from kd.runs.build import native_bf16
from teachers.unet import unet

GOAL = 3.0
Answer = Callable[[Tensor], Tensor]


class PlainUNet(nn.Module):
    """The paper's network with padding and batch norm, written without optimisations."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.down = nn.ModuleList([self.block(4, width)])
        self.down += [self.block(a, b) for a, b in pairwise(widths)]
        self.up, self.join = nn.ModuleList(), nn.ModuleList()
        for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.up.append(nn.ConvTranspose2d(a, b, 2, stride=2))
            self.join.append(self.block(a, b))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(a: int, b: int) -> nn.Sequential:
        """Twice convolution, batch norm, ReLU."""
        return nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
            nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 4, H, W) to (N, C, H, W); sides are multiples of 16."""
        kept = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, join, skip in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


@dataclass
class Way:
    """One variant and its measurements."""

    name: str
    answer: Answer
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: float = 0.0

    def round(self, images: Tensor) -> None:
        """Run the model once and record time."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.answer(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def pair(classes: int) -> tuple[nn.Module, nn.Module]:
    """Build our U-Net with fitted batch norms, and the plain one with the same weights."""
    torch.manual_seed(0)
    ours = unet(classes).eval().requires_grad_(False)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)
    plain = PlainUNet(classes).eval().requires_grad_(False)
    by_shape: dict[str, Tensor] = {}
    theirs = {"stem": "down.0", "head": "head"}
    theirs |= {f"downs.{level}.1": f"down.{level + 1}" for level in range(4)}
    theirs |= {f"ups.{level}.up": f"up.{level}" for level in range(4)}
    theirs |= {f"ups.{level}.convolve": f"join.{level}" for level in range(4)}
    for name, tensor in ours.state_dict().items():
        prefix = next(mine for mine in theirs if name.startswith(f"{mine}."))
        by_shape[theirs[prefix] + name.removeprefix(prefix)] = tensor
    plain.load_state_dict(by_shape)
    return ours, plain


def with_inference(model: nn.Module, *, channels_last: bool = True, bf16: bool = False) -> Answer:
    """Return the model as a function, in inference mode and its memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)

    @torch.inference_mode()
    def answer(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits: Tensor = model(images.contiguous(memory_format=layout))
            return logits

    return answer


def compiled(model: nn.Module) -> Answer:
    """Compile the model with frozen weights."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return with_inference(torch.compile(model))  # type: ignore[arg-type]


def ways_to_answer(
    ours: nn.Module, plain: nn.Module, device: torch.device, options: argparse.Namespace
) -> list[Way]:
    """List the variants, plain first."""
    folded = for_answers(ours)
    found = [
        Way("plain: float32, NCHW", with_inference(plain, channels_last=False)),
        Way("channels_last", with_inference(ours)),
        Way("folded, NCHW", with_inference(for_answers(ours), channels_last=False)),
        Way("folded, channels_last", with_inference(folded)),
    ]
    if options.compile:
        found.append(Way("folded, compiled", compiled(for_answers(ours))))
    if device.type == "cpu":
        sides = 4, 4, options.size // 2, options.size // 2
        samples = [torch.randn(sides)]
        found.append(Way("int8", with_inference(in_int8(ours, samples, spared=["head"]))))
    if native_bf16(device):
        found.append(Way("folded, channels_last, bf16", with_inference(folded, bf16=True)))
    return found


def peak(way: Way, images: Tensor) -> float:
    """Return the MiB that one pass adds at its peak: torch's allocator, or the whole process."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.answer(images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return float(sum(_allocated(way, images))) / 2**20


def _allocated(way: Way, images: Tensor) -> list[int]:
    """Return the highest sum of allocations on the CPU, from torch's profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        way.answer(images)
    held, highest = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return [highest]


def main() -> int:
    """Print the table; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, plain = (model.to(device) for model in pair(classes=80))
    images = torch.randn(options.batch_size, 4, options.size, options.size, device=device)
    ways = ways_to_answer(ours, plain, device, options)
    expected = ways[0].answer(images)
    for way in ways:
        error = (way.answer(images).float() - expected).abs().max() / expected.abs().max()
        way.memory = peak(way, images)
        sys.stderr.write(f"{way.name}: largest relative difference {error:.1e}\n")
    for number in range(options.rounds):
        for way in ways[:: 1 if number % 2 else -1]:
            way.round(images)
    say(ways, options, device)
    return int(max(rate(way.cpu) for way in ways[1:]) / rate(ways[0].cpu) < GOAL)


def rate(seconds: list[float]) -> float:
    """Return the rate of the best round."""
    return 1 / min(seconds)


def say(ways: list[Way], options: argparse.Namespace, device: torch.device) -> None:
    """Print the table."""
    sys.stdout.write(
        f"U-Net, width 64, transposed, {options.size} px, batches of {options.batch_size}, "
        f"{device}, {torch.get_num_threads()} threads, best of {options.rounds} rounds; "
        f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB\n"
    )
    sys.stdout.write(
        f"{'':<30}{'images/s':>10}{'ratio':>8}{'CPU ratio':>11}{'CPU s':>8}{'MiB':>8}\n"
    )
    plain = ways[0]
    for way in ways:
        sys.stdout.write(
            f"{way.name:<30}{options.batch_size * rate(way.wall):>10.3f}"
            f"{rate(way.wall) / rate(plain.wall):>8.2f}{rate(way.cpu) / rate(plain.cpu):>11.2f}"
            f"{min(way.cpu):>8.2f}{way.memory:>8.0f}\n"
        )
    if not native_bf16(device):
        sys.stdout.write("bf16 left out: this hardware has no bfloat16 multiplication\n")
    sys.stdout.write(f"goal: {GOAL} times the images of plain\n")


if __name__ == "__main__":
    raise SystemExit(main())
