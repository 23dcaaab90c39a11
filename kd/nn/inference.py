"""Faster inference: fold batch norms into convolutions, and compute in int8."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from kd.errors import UserError
from kd.nn.trunk import TorchvisionTrunk


def for_answers(model: nn.Module) -> nn.Module:
    """Copy a model for inference, without gradients, and fold batch norms where possible.

    A batch norm is folded only where a convolution is known to run directly before it: in a
    `Sequential`, in a torchvision residual block, and between the steps of a trunk. Modules with
    forward hooks are not folded.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    uses = Counter(id(module) for _, module in copied.named_modules(remove_duplicate=False))
    for module in list(copied.modules()):
        for before, after in _neighbours(module):
            convolution, norm = getattr(module, before), getattr(module, after)
            once = uses[id(convolution)] == uses[id(norm)] == 1
            if once and _can_fold(convolution, norm):
                transposed = isinstance(convolution, nn.ConvTranspose2d)
                setattr(module, before, fuse_conv_bn_eval(convolution, norm, transpose=transposed))
                setattr(module, after, nn.Identity())
    return copied


def _neighbours(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of two children of a module that run directly after each other."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        yield from pairwise(name for name, _ in module.named_children())
    elif isinstance(module, BasicBlock | Bottleneck):
        for number in (1, 2, 3):
            if hasattr(module, f"conv{number}"):
                yield f"conv{number}", f"bn{number}"
    elif isinstance(module, TorchvisionTrunk) and not module.tokens:
        yield from pairwise(module.order)


def _can_fold(first: nn.Module, second: nn.Module) -> bool:
    """Return True for a convolution and a batch norm, both without forward hooks."""
    return (
        isinstance(first, nn.Conv2d | nn.ConvTranspose2d)
        and isinstance(second, nn.BatchNorm2d)
        and type(second).forward is nn.BatchNorm2d.forward  # timm's has an activation inside
        and isinstance(second.running_var, torch.Tensor)
        and not first._forward_hooks
        and not second._forward_hooks
    )


ENGINE = "onednn"


def in_int8(
    model: nn.Module, samples: Iterable[Tensor], *, spared: Iterable[str] = ()
) -> nn.Module:
    """Copy a model and quantise the copy: convolutions and linear layers compute in int8.

    The copy runs on the CPU and has no gradients. Transposed convolutions stay in float32, since
    torch has no per-channel scales for them.

    Args:
        model: A model in evaluation mode that torch.fx can trace.
        samples: A few batches of typical inputs, to measure the ranges of activations.
        spared: Paths of modules that stay in float32, such as the head.
    """
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise UserError(f"int8: this torch has no engine {ENGINE!r}; compute in float32")
    batches = list(samples)
    if not batches:
        raise UserError("int8: no samples to measure the ranges of activations with")
    torch.backends.quantized.engine = ENGINE
    mapping = get_default_qconfig_mapping(ENGINE).set_object_type(nn.ConvTranspose2d, None)
    for path in spared:
        model.get_submodule(path)
        mapping = mapping.set_module_name(path, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this quantisation API is deprecated
        try:
            watched = prepare_fx(copy.deepcopy(model).eval(), mapping, (batches[0],))
        except (torch.fx.proxy.TraceError, TypeError) as error:
            raise UserError(f"int8: {type(model).__name__} cannot be traced: {error}") from error
        with torch.no_grad():
            for batch in batches:
                watched(batch)
            converted: nn.Module = convert_fx(watched)
    return converted.requires_grad_(False)
