"""Batch norm folded into the convolution before it, for a network that only answers.

In evaluation a batch norm is one multiplication and one addition for each channel, and so is a
convolution's output: `gamma * (w * x + b - mean) / sqrt(var + eps) + beta` is a convolution again.
Numbers agree but for rounding; a pass over memory is saved for each batch norm.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from kd.nn.trunk import Trunk

Place = tuple[nn.Module, str]  # a module and the name of a child


def for_answers(model: nn.Module) -> nn.Module:
    """A frozen copy of a model in evaluation, its batch norms folded where that is certain.

    A pair is folded where the order of modules is known: neighbours in a `Sequential`, in
    torchvision's residual blocks and in the steps of a trunk. What is tapped or trained must not
    be folded: a convolution then gives what its batch norm gave.

    Args:
        model: Stays as it is.

    Returns:
        The copy, without gradients.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    uses = Counter(id(module) for _, module in copied.named_modules(remove_duplicate=False))
    for module in list(copied.modules()):
        for (first, before), (second, after) in _neighbours(module):
            convolution, norm = getattr(first, before), getattr(second, after)
            once = uses[id(convolution)] == uses[id(norm)] == 1
            if once and _can_fold(convolution, norm):
                transposed = isinstance(convolution, nn.ConvTranspose2d)
                setattr(first, before, fuse_conv_bn_eval(convolution, norm, transpose=transposed))
                setattr(second, after, nn.Identity())
    return copied


def _neighbours(module: nn.Module) -> Iterator[tuple[Place, Place]]:
    """Children that run one after the other with nothing else in between."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        yield from pairwise([(module, name) for name, _ in module.named_children()])
    elif isinstance(module, BasicBlock | Bottleneck):
        for number in (1, 2, 3):
            if hasattr(module, f"conv{number}"):
                yield (module, f"conv{number}"), (module, f"bn{number}")
    elif isinstance(module, Trunk) and not module.tokens:
        yield from pairwise([(module, child) for child in module.order])


def _can_fold(first: nn.Module, second: nn.Module) -> bool:
    """Whether the second is a batch norm, with statistics of its own, of what the first gives."""
    return (
        isinstance(first, nn.Conv2d | nn.ConvTranspose2d)
        and isinstance(second, nn.BatchNorm2d)
        and isinstance(second.running_var, torch.Tensor)
        and not first._forward_hooks
        and not second._forward_hooks
    )
