"""Queries that read the tokens of a scene, each without what it may not see."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kd.errors import UserError

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
REACHES = (0.05, 0.15, 0.3, 0.6)  # of the frame's long side
_RELATIONS = 6 + len(REACHES)
_SMALLEST = 1e-3


def place_features(boxes: Tensor) -> Tensor:
    """Centre and sides of boxes (..., 4), xyxy in units of the frame, and waves of them.

    Waves of growing frequency let a small network tell near places apart (Tancik et al., 2020,
    https://arxiv.org/abs/2006.10739).
    """
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    plain = torch.cat([centre, sides], dim=-1)
    waves = torch.cat([plain * (torch.pi * frequency) for frequency in FREQUENCIES], dim=-1)
    return torch.cat([plain, sides.clamp(min=_SMALLEST).log(), waves.sin(), waves.cos()], dim=-1)


PLACE_FEATURES = 6 + 8 * len(FREQUENCIES)


def relations(queries: Tensor, tokens: Tensor) -> Tensor:
    """How tokens (K, T, 4) lie to queries (K, 4), boxes in units of the frame: (K, T, 10)."""
    own = queries[:, None]
    centre, sides = (tokens[..., :2] + tokens[..., 2:]) / 2, tokens[..., 2:] - tokens[..., :2]
    middle, extent = (own[..., :2] + own[..., 2:]) / 2, own[..., 2:] - own[..., :2]
    offset = centre - middle
    ratio = sides.clamp(min=_SMALLEST).log() - extent.clamp(min=_SMALLEST).log()
    squared = offset.square().sum(dim=-1, keepdim=True)
    near = torch.cat([(-squared / (2 * reach**2)).exp() for reach in REACHES], dim=-1)
    low = torch.maximum(tokens[..., :2], own[..., :2])
    high = torch.minimum(tokens[..., 2:], own[..., 2:])
    shared = (high - low).clamp(min=0.0).prod(dim=-1, keepdim=True)
    covered = shared / sides.prod(dim=-1, keepdim=True).clamp(min=_SMALLEST**2)
    return torch.cat([offset, ratio, squared.sqrt(), covered, near], dim=-1)


class Reader(nn.Module):
    """A query reads tokens (attention whose keys and values know how a token lies to it), thinks.

    The tokens are never changed by one another, so that what a query may not see reaches it by no
    detour: the answers to all queries, each under its own set of visible tokens, come from one
    pass. After the disentangled context transformer (Kasai et al., 2020,
    https://arxiv.org/abs/2001.05136), with boxes in the place of positions in a sentence.

    Args:
        width: Length of queries and tokens.
        heads: Of the attention; must divide `width`.
        dropout: After attention and in the feed-forward part.
        attention: `softmax`, or `sigmoid` weights, which do not compete: evidence adds up
            (Ramapuram et al., 2024, https://arxiv.org/abs/2409.04431).
    """

    def __init__(
        self, width: int, *, heads: int, dropout: float, attention: Literal["softmax", "sigmoid"]
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UserError(f"heads {heads} must divide width {width}")
        self.heads, self.attention = heads, attention
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.lie_key, self.lie_value = nn.Linear(_RELATIONS, width), nn.Linear(_RELATIONS, width)
        self.bias = nn.Linear(_RELATIONS, heads)
        self.join = nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(dropout)
        if attention == "sigmoid":  # about one token's worth in all, to begin with
            nn.init.constant_(self.bias.bias, -2.0)

    def forward(
        self, queries: Tensor, tokens: Tensor, lie: Tensor, rows: Tensor, seen: Tensor
    ) -> Tensor:
        """One layer.

        Args:
            queries: (K, D).
            tokens: (N, T, D).
            lie: `relations` of each query's tokens, (K, T, 10).
            rows: (K,) the row of `tokens` that each query reads.
            seen: (K, T) bool, what it may see of it; possibly nothing.

        Returns:
            (K, D).
        """
        split = (self.heads, -1)
        asked = self.query(self.before(queries)).unflatten(1, split)  # (K, h, D/h)
        keys = (self.key(tokens)[rows] + self.lie_key(lie)).unflatten(2, split)
        values = (self.value(tokens)[rows] + self.lie_value(lie)).unflatten(2, split)
        scores = torch.einsum("khd,kthd->kth", asked, keys) * asked.shape[2] ** -0.5
        scores = (scores + self.bias(lie)).float()
        if self.attention == "sigmoid":
            weights = scores.sigmoid() * seen[:, :, None]
        else:  # beside the tokens there is nothing, which a query may read as well
            scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
            nothing = scores.new_zeros(len(scores), 1, self.heads)
            weights = torch.cat([scores, nothing], dim=1).softmax(dim=1)[:, :-1]
        read = torch.einsum("kth,kthd->khd", weights.to(values.dtype), values).flatten(1)
        queries = queries + self.drop(self.join(read))
        thought: Tensor = queries + self.drop(self.think(self.after(queries)))
        return thought
