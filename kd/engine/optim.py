"""Optimisers, learning rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kd.errors import UserError


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Update `average`, an exponential moving average of a model's weights and buffers.

    In the first steps the decay is at most (1 + step) / (10 + step), so that the initial weights
    soon lose their influence. Integer buffers are copied.
    """
    decay = min(decay, (1 + step) / (10 + step))
    ours, theirs = average.state_dict(), model.state_dict()
    moving = [name for name, tensor in ours.items() if tensor.is_floating_point()]
    together = get_ema_multi_avg_fn(decay)
    together([ours[name] for name in moving], [theirs[name] for name in moving], None)
    for name in ours.keys() - moving:
        ours[name].copy_(theirs[name])


def make_schedule(
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    name: str = "cosine",
    warmup: float = 0.0,
    final: float = 0.0,
    power: float = 0.9,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build a learning rate schedule that is a pure function of the step.

    Args:
        optimizer: Optimiser whose learning rates the schedule multiplies.
        steps: Total number of training steps.
        name: constant, cosine, linear or poly.
        warmup: Fraction of the steps over which the rate rises from near 0 to the full rate.
        final: Learning rate at the end, as a fraction of the full rate.
        power: Exponent of the poly schedule.
    """
    rising = round(warmup * steps)
    shapes: dict[str, Callable[[float], float]] = {
        "cosine": lambda x: 0.5 + 0.5 * math.cos(math.pi * x),
        "linear": lambda x: 1.0 - x,
        "poly": lambda x: float((1.0 - x) ** power),
    }

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if name == "constant":
            return 1.0
        x = min((step - rising) / max(steps - rising, 1), 1.0)
        return final + (1.0 - final) * shapes[name](x)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    lr_scale: Mapping[str, float] | None = None,
    decay_scale: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Build an optimiser whose learning rate and weight decay may differ between parameters.

    Args:
        model: The model; parameters whose learning rate is 0 are frozen.
        name: adamw, adam or sgd (with Nesterov momentum).
        lr: Base learning rate.
        weight_decay: Weight decay; biases and norms have none.
        momentum: Momentum of sgd, or the first beta of adam and adamw.
        lr_scale: Factors on the learning rate, by prefix of parameter names; the longest matching
            prefix applies. A prefix that no parameter has is a UserError.
        decay_scale: Factors on the weight decay, likewise.
    """
    names = [full.removeprefix("student.") for full, _ in model.named_parameters()]
    rates = _by_prefix(names, lr_scale or {}, "lr_scale")
    decays = _by_prefix(names, decay_scale or {}, "decay_scale")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    parameters = list(model.parameters())
    for parameter, rate, scale in zip(parameters, rates, decays, strict=True):
        if rate == 0.0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            decay = weight_decay * scale if parameter.ndim > 1 else 0.0
            groups.setdefault((lr * rate, decay), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": group, "lr": rate, "weight_decay": decay}
        for (rate, decay), group in sorted(groups.items(), key=lambda item: item[0])
    ]
    if name == "sgd":
        return torch.optim.SGD(settings, lr=lr, momentum=momentum, nesterov=momentum > 0)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(settings, lr=lr, betas=(momentum, 0.999))


def _by_prefix(names: Sequence[str], factors: Mapping[str, float], what: str) -> list[float]:
    """Return the factor of the longest prefix of each name, or 1; `what` is the option's name."""
    fitting = [[prefix for prefix in factors if name.startswith(prefix)] for name in names]
    if unknown := set(factors) - {prefix for found in fitting for prefix in found}:
        tops = ", ".join(sorted({name.split(".")[0] for name in names}))
        raise UserError(
            f"optimizer.{what}: no parameter name starts with {', '.join(sorted(unknown))}; "
            f"the model's parameters start with {tops}"
        )
    return [factors[max(found, key=len)] if found else 1.0 for found in fitting]
