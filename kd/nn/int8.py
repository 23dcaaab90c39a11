"""A frozen network in 8-bit integers, for processors that multiply those several times as fast.

Post-training static quantisation (Jacob et al., 2018, https://arxiv.org/abs/1712.05877) by torch's
own graph mode: weights by channel, activations by the ranges that some samples show. It changes the
answers a little, so what it is used for must be measured: `benchmarks/int8_teacher.py` does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from kd.errors import UserError

ENGINE = "onednn"


def in_int8(
    model: nn.Module, samples: Iterable[Tensor], *, spared: Iterable[str] = ()
) -> nn.Module:
    """A copy whose convolutions and linear layers compute in int8, on the CPU.

    Transposed convolutions stay in float32, for which there are no scales by channel.

    Args:
        model: In evaluation; one that torch.fx can trace. It stays as it is.
        samples: Inputs like those to come, for the ranges of activations; a few batches.
        spared: Paths of modules that stay in float32: a head whose logits matter.

    Returns:
        The copy, without gradients.

    Raises:
        UserError: This torch cannot compute in int8 here, there are no samples, or the model's
            `forward` cannot be traced.
    """
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise UserError(f"int8: this torch has no engine {ENGINE!r}; compute in float32")
    batches = list(samples)
    if not batches:
        raise UserError("int8: no samples to see the ranges of activations by")
    torch.backends.quantized.engine = ENGINE
    mapping = get_default_qconfig_mapping(ENGINE).set_object_type(nn.ConvTranspose2d, None)
    for path in spared:
        model.get_submodule(path)
        mapping = mapping.set_module_name(path, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what will replace this in torch, some day
        try:
            watched = prepare_fx(copy.deepcopy(model).eval(), mapping, (batches[0],))
        except (torch.fx.proxy.TraceError, TypeError) as error:
            raise UserError(f"int8: {type(model).__name__} cannot be traced: {error}") from error
        with torch.no_grad():
            for batch in batches:
                watched(batch)
            converted: nn.Module = convert_fx(watched)
    return converted.requires_grad_(False)
