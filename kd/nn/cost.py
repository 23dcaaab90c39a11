"""Cost of a network: multiply-adds and latency of a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kd.errors import at_least
from kd.nn.freeze import evaluating

WARM_UP = 3  # untimed forward passes
# Kernels of `scaled_dot_product_attention` for which torch's counter may have no formula.
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",  # XPU and devices of other vendors
)


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Count the multiply-adds of a forward pass in evaluation mode, summed over all images.

    Convolutions, linear layers and matrix products, including those of attention, are counted, also
    for padded zeros. Biases, norms, activations and resizing are not counted.

    Args:
        model: A network whose `forward` takes only images. Its mode is restored afterwards.
        images: (N, 3, H, W), on the model's device, which may be "meta"; values do not matter.
    """
    kernels = (getattr(torch.ops.aten, name, None) for name in _ATTENTION)
    formulas = {kernel: _attention_flops for kernel in kernels if kernel is not None}
    with (
        torch.no_grad(),
        evaluating(model),
        _plain_attention(),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        model(images)
    return int(counter.get_total_flops()) // 2


def latency(model: nn.Module, images: Tensor, repeats: int = 20) -> float:
    """Measure the median time in seconds of `repeats` forward passes of the whole batch.

    The model runs in evaluation mode, after a few untimed passes.
    """
    at_least("latency", repeats=(repeats, 1))
    seconds = []
    with torch.no_grad(), evaluating(model):
        for turn in range(WARM_UP + repeats):
            _finish(images.device)
            start = time.perf_counter()
            model(images)
            _finish(images.device)
            if turn >= WARM_UP:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable the fused evaluation path of `nn.MultiheadAttention`, which torch does not count."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _attention_flops(query: object, key: object, value: object, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _finish(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
