"""Grey pictures beside the hidden region, for teachers that see no colour."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's and torchvision's grey


def grey_and_region(images: Tensor) -> Tensor:
    """Luma of normalised RGB beside the region's channel.

    What is 0 in all three channels, the hidden region, stays 0. A trunk whose first convolution
    was summed over RGB answers as it did to the grey picture in three equal channels.

    Args:
        images: Normalised RGB and the region, (K, 4, H, W).

    Returns:
        (K, 2, H, W).
    """
    luma = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return torch.cat([(images[:, :3] * luma).sum(dim=1, keepdim=True), images[:, 3:]], dim=1)
