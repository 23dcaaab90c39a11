"""Loss functions that compare a student's tensor with a teacher's and return a scalar mean.

All raise `UserError` if shapes, dtypes or devices do not match, or if an option is out of range.
"""

from kd.losses.imitation import anchor_grid, hint, imitation, imitation_mask
from kd.losses.logits import channel_wise, decoupled, kl_logits, pixel_wise
from kd.losses.pair_wise import pair_wise
from kd.losses.saliency import saliency_kld, saliency_maps
from kd.losses.supervised import cross_entropy_labelled, masked_bce

__all__ = [
    "anchor_grid",
    "channel_wise",
    "cross_entropy_labelled",
    "decoupled",
    "hint",
    "imitation",
    "imitation_mask",
    "kl_logits",
    "masked_bce",
    "pair_wise",
    "pixel_wise",
    "saliency_kld",
    "saliency_maps",
]
