"""Layers of the scene transformer: hidden objects attend to the tokens of their scene.

Each hidden object is a query with a separate mask over the tokens. A scene is one image.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
# Standard deviations of the Gaussian features of a distance; the frame's long side has length 1.
REACHES = (0.05, 0.15, 0.3, 0.6)
_RELATIONS = 6 + len(REACHES)
_SMALLEST = 1e-3


def place_features(boxes: Tensor) -> Tensor:
    """Compute Fourier features (..., PLACE_FEATURES) of the positions and sizes of boxes (..., 4).

    Boxes are xyxy in units of the frame's long side. Tancik et al., 2020,
    https://arxiv.org/abs/2006.10739.
    """
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    plain = torch.cat([centre, sides], dim=-1)
    waves = torch.cat([plain * (torch.pi * frequency) for frequency in FREQUENCIES], dim=-1)
    return torch.cat([plain, sides.clamp(min=_SMALLEST).log(), waves.sin(), waves.cos()], dim=-1)


PLACE_FEATURES = 6 + 8 * len(FREQUENCIES)


def relations(queries: Tensor, tokens: Tensor) -> Tensor:
    """Compute the positions (K, T, 10) of tokens relative to queries.

    The features are the offset, log ratio of sides, distance, fraction of the token's box that the
    query's box covers, and Gaussians of the distance. Boxes of queries (K, 4) and of tokens
    (K, T, 4) are xyxy in units of the frame's long side.
    """
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


class Rows(NamedTuple):
    """Positions of M objects or queries in a padded batch of N scenes with T slots each.

    `put` and `take` convert between a list of M values and the padded batch.
    """

    slots: Tensor  # (M,) index into the N * T slots
    shape: tuple[int, int]  # N, T

    @classmethod
    def of(cls, scenes: Tensor, count: int = 0) -> Rows:
        """Assign a slot to each object or query, given the index of its scene, (M,), in any order.

        `count` is the least number of scenes; it is needed if the last scenes may have no object.
        """
        counts = torch.bincount(scenes, minlength=count)
        most = int(counts.max()) if len(counts) else 0
        order = torch.argsort(scenes, stable=True)
        sorted_scenes = scenes[order]
        place = torch.arange(len(scenes), device=scenes.device)
        place = place - (counts.cumsum(0) - counts)[sorted_scenes]
        slots = torch.empty_like(scenes).index_copy(0, order, sorted_scenes * most + place)
        return cls(slots, (len(counts), most))

    def put(self, values: Tensor) -> Tensor:
        """Arrange values (M, ...) as a batch (N, T, ...), padded with 0."""
        places = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        filled: Tensor = places.index_copy(0, self.slots, values).unflatten(0, self.shape)
        return filled

    def take(self, groups: Tensor) -> Tensor:
        """Select the values (M, ...) from a batch (N, T, ...); the inverse of `put`."""
        return groups.flatten(0, 1)[self.slots]


class Tokens(NamedTuple):
    """T tokens for each of N scenes, and which of them each of K queries may attend to."""

    tokens: Tensor  # (N, T, D)
    lie: Tensor  # (K, T, 10), `relations` of each query to the tokens of its scene
    seen: Tensor  # (K, T) bool, the tokens that a query may attend to, possibly none
    queries: Rows  # positions of the queries in the batch of scenes


class Reader(nn.Module):
    """Transformer layer: queries attend to tokens by content and relative position.

    A feed-forward layer follows the attention. Tokens do not attend to each other, so a masked
    token cannot influence a query indirectly, and all queries are computed in one pass, each with a
    separate mask. The design is that of the disentangled context transformer (Kasai et al., 2020,
    https://arxiv.org/abs/2001.05136), with boxes in place of positions in a sentence.

    Args:
        width: Length of queries and tokens, D.
        heads: Number of attention heads; must divide `width`.
        dropout: Dropout probability after attention and in the feed-forward layer.
        attention: `softmax`; or `sigmoid`, whose weights do not sum to 1, so that the evidence of
            several tokens adds up (Ramapuram et al., 2024, https://arxiv.org/abs/2409.04431).
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
        if attention == "sigmoid":  # so that the initial attention weights sum to about 1
            nn.init.constant_(self.bias.bias, -2.0)

    def forward(self, queries: Tensor, source: Tokens) -> Tensor:
        """Update queries (K, D) by attention to the tokens of their scenes."""
        heads, width, rows = self.heads, queries.shape[1] // self.heads, source.queries
        wanted = self.query(self.before(queries)).unflatten(1, (heads, width))
        keys = self.key(source.tokens).unflatten(2, (heads, width))
        values = self.value(source.tokens).unflatten(2, (heads, width))
        # By q (k + A lie) = q k + (q A) lie, relative positions need no tensor of shape (K, T, D).
        turned, shift = _per_head(self.lie_key, heads)
        scores = rows.take(torch.einsum("nqhd,nthd->nqth", rows.put(wanted), keys))
        lying = torch.einsum("khd,hdr->khr", wanted, turned)
        scores = scores + torch.einsum("khr,ktr->kth", lying, source.lie)
        scores = scores + torch.einsum("khd,hd->kh", wanted, shift)[:, None]
        weights = self._weights((scores * width**-0.5 + self.bias(source.lie)).float(), source.seen)
        weights = weights.to(values.dtype)
        read = rows.take(torch.einsum("nqth,nthd->nqhd", rows.put(weights), values))
        turned, shift = _per_head(self.lie_value, heads)
        lain = torch.einsum("kth,ktr->khr", weights, source.lie.to(weights.dtype))
        read = read + torch.einsum("khr,hdr->khd", lain, turned)
        read = read + weights.sum(dim=1)[:, :, None] * shift
        queries = queries + self.drop(self.join(read.flatten(1)))
        thought: Tensor = queries + self.drop(self.think(self.after(queries)))
        return thought

    def _weights(self, scores: Tensor, seen: Tensor) -> Tensor:
        """Attention weights (K, T, heads) from scores (K, T, heads), 0 for masked tokens."""
        if self.attention == "sigmoid":
            return scores.sigmoid() * seen[:, :, None]
        # An additional empty token with a score of 0 allows a query to attend to nothing.
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
        nothing = scores.new_zeros(len(scores), 1, self.heads)
        return torch.cat([scores, nothing], dim=1).softmax(dim=1)[:, :-1]


def _per_head(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Split weight (D, inputs) and bias (D,) by head into (h, D/h, inputs) and (h, D/h)."""
    return linear.weight.unflatten(0, (heads, -1)), linear.bias.unflatten(0, (heads, -1))


class Patches(nn.Module):
    """Convert an image's square patches to tokens that have a small receptive field.

    A token depends on patches at most `reach` patches away. So one pass over the whole image serves
    all hidden regions: the query for a region masks the tokens that depend on the region, see
    `touched`. Norms are over the channels of one patch, since other norms would make each token
    depend on the whole image.

    Args:
        width: Length of a token, D.
        patch: Side of a patch, pixels.
        reach: Number of 3x3 convolutions over the patches.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(self, width: int, *, patch: int, reach: int) -> None:
        if patch < 1 or reach < 0:
            raise UserError(
                f"scene_transformer: patch {patch} must be 1 or more, reach {reach} 0 or more"
            )
        super().__init__()
        self.patch, self.reach = patch, reach
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.start = nn.Sequential(_PlaceNorm(width), nn.GELU(), nn.Conv2d(width, width, 1))
        self.near = nn.ModuleList(
            nn.Sequential(
                _PlaceNorm(width),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(reach)
        )
        self.end = _PlaceNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to tokens (N, D, ceil(H / patch), ceil(W / patch))."""
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.start(self.stem(padded))
        for step in self.near:
            maps = maps + step(maps)
        ended: Tensor = self.end(maps)
        return ended

    def touched(self, regions: Tensor) -> Tensor:
        """Mark the tokens (K, h, w) that depend on any pixel of bool masks (K, H, W)."""
        height, width = regions.shape[1:]
        padded = F.pad(regions.float(), (0, -width % self.patch, 0, -height % self.patch))
        hit = F.max_pool2d(padded[:, None], self.patch)
        if self.reach:
            hit = F.max_pool2d(hit, 2 * self.reach + 1, stride=1, padding=self.reach)
        return hit[:, 0] > 0


class _PlaceNorm(nn.Module):
    """Layer norm over the channels of each cell of a map (N, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self.norm(maps.movedim(1, -1)).movedim(-1, 1)
        return normed


def place_boxes(grid: tuple[int, int], frame: tuple[float, float], like: Tensor) -> Tensor:
    """Compute the boxes (h * w, 4) of the cells of an h x w grid, with `like`'s dtype and device.

    `frame` is the height and width of the area that the grid covers. The unit of `frame` and of the
    boxes is the long side of the image frame.
    """
    rows = torch.arange(grid[0], device=like.device, dtype=like.dtype) * (frame[0] / grid[0])
    columns = torch.arange(grid[1], device=like.device, dtype=like.dtype) * (frame[1] / grid[1])
    top, left = torch.meshgrid(rows, columns, indexing="ij")
    boxes = [left, top, left + frame[1] / grid[1], top + frame[0] / grid[0]]
    return torch.stack(boxes, dim=-1).flatten(0, 1)


# Factor for the initial evidence weights: with large random weights, training would commit early to
# random scene types, which are hard to unlearn.
_INITIAL_SCALE = 0.2
_NAMES_STD = 0.5
_NEVER = -1e4  # log odds of a dropped type; not -inf, because all types may be dropped at once


class SceneKinds(nn.Module):
    """Mixture over latent scene types, `p(c | rest) = sum_k p(k | rest) p(c | k, box, rest)`.

    Each visible object j adds evidence for each type k: `log p(k | rest) = b_k + sum_j e_k(class_j,
    box_j) + const`. Each type has a separate class distribution, which depends on the box. Types
    are latent and learned from co-occurrence (latent class analysis, Lazarsfeld and Henry, 1968;
    the output layer is a mixture of softmaxes, Yang et al., 2018,
    https://arxiv.org/abs/1711.03953). A few thousand scenes are enough to train this mixture, while
    attention alone needs many more to learn that evidence multiplies.

    Args:
        num_classes: Number of classes, C.
        width: Width of the hidden layers.
        kinds: Number of scene types; more types than needed do no harm.
        dropout: Fraction of the types dropped in training, so that no type is indispensable.
    """

    def __init__(self, num_classes: int, *, width: int, kinds: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.names = nn.Embedding(num_classes, width)
        self.place = nn.Sequential(nn.Linear(PLACE_FEATURES, width), nn.GELU())
        last = nn.Linear(width, kinds)
        self.speak = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), last)
        self.belongs = nn.Sequential(
            nn.Linear(PLACE_FEATURES, width), nn.GELU(), nn.Linear(width, kinds * num_classes)
        )
        self.often = nn.Parameter(torch.zeros(kinds))
        nn.init.normal_(self.names.weight, std=_NAMES_STD)
        with torch.no_grad():
            last.weight.mul_(_INITIAL_SCALE)

    def evidence(self, classes: Tensor, boxes: Tensor) -> Tensor:
        """Compute the evidence (M, kinds), in log odds, of objects for each scene type.

        `classes` is (M,); `boxes` is (M, 4), in units of the frame's long side.
        """
        place = self.place(place_features(boxes))
        evidence: Tensor = self.speak(torch.cat([self.names(classes), place], dim=1))
        return evidence

    def forward(self, hidden: Tensor, others: Tokens, logits: Tensor) -> Tensor:
        """Compute class log-probabilities (K, C) of the hidden objects.

        Args:
            hidden: Boxes of the hidden objects, (K, 4), in units of the frame's long side.
            others: Tokens that are the `evidence` of all objects; `others.seen` selects the visible
                objects for each hidden object.
            logits: Class logits that are added for all types alike, (K, C).
        """
        # Sum over the visible objects directly, because subtracting the masked objects from a total
        # would add rounding errors.
        seen = others.queries.put(others.seen.to(others.tokens.dtype))
        votes = others.queries.take(torch.einsum("nqt,ntk->nqk", seen, others.tokens))
        kind = votes + self.often
        if self.training and self.dropout:
            kind = kind.masked_fill(torch.rand_like(kind) < self.dropout, _NEVER)
        belongs = self.belongs(place_features(hidden)).unflatten(1, (-1, self.num_classes))
        of_kind = (belongs + logits[:, None]).float().log_softmax(dim=2)
        joint = kind.float().log_softmax(dim=1)[:, :, None] + of_kind
        mixed: Tensor = joint.logsumexp(dim=1)
        return mixed
