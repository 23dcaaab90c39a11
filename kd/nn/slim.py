"""A network with fewer channels, made from one of torchvision's before it is trained."""

from __future__ import annotations

import torch
from torch import nn

from kd.errors import UserError


def slim(network: nn.Module, width: float, *, what: str) -> None:
    """Replace every convolution and batch norm by one with a share of the channels.

    The first convolution keeps its input channels. Initial values are drawn as He et al. (2015)
    do for the convolutions; linear layers stay, since a trunk has no use for them.

    Args:
        network: Changed in place.
        width: Share of the channels.
        what: Its name, for messages.

    Raises:
        UserError: Channels do not divide, or there are layers that know a number of channels
            otherwise.
    """
    pictures = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))

    def part(channels: int) -> int:
        share = channels * width
        if share < 1 or share != int(share):
            raise UserError(f"{what}: width {width:g} leaves {share:g} of {channels} channels")
        return int(share)

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm | nn.MultiheadAttention):
                raise UserError(f"{what}: width is for networks of convolutions and batch norms")
            if isinstance(child, nn.BatchNorm2d):
                fewer: nn.Module = nn.BatchNorm2d(
                    part(child.num_features), child.eps, child.momentum
                )
            elif isinstance(child, nn.Conv2d):
                inputs = child.in_channels
                fewer = nn.Conv2d(
                    inputs if inputs == pictures else part(inputs),
                    part(child.out_channels),
                    child.kernel_size,  # type: ignore[arg-type]
                    child.stride,  # type: ignore[arg-type]
                    child.padding,  # type: ignore[arg-type]
                    child.dilation,  # type: ignore[arg-type]
                    1 if child.groups == 1 else part(child.groups),
                    child.bias is not None,
                )
                nn.init.kaiming_normal_(fewer.weight, mode="fan_out", nonlinearity="relu")
                if fewer.bias is not None:
                    with torch.no_grad():
                        fewer.bias.zero_()
            else:
                continue
            setattr(parent, name, fewer)
