"""Layers of a transformer whose queries attend to the tokens of a scene, each with its own mask."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError

FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
REACHES = (0.05, 0.15, 0.3, 0.6)  # widths of Gaussians of the distance, in frame units
_RELATIONS = 6 + len(REACHES)
_SMALLEST = 1e-3


def place_features(boxes: Tensor) -> Tensor:
    """Fourier features of boxes (..., 4), xyxy in units of the frame's long side.

    Tancik et al., 2020, https://arxiv.org/abs/2006.10739.
    """
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    plain = torch.cat([centre, sides], dim=-1)
    waves = torch.cat([plain * (torch.pi * frequency) for frequency in FREQUENCIES], dim=-1)
    return torch.cat([plain, sides.clamp(min=_SMALLEST).log(), waves.sin(), waves.cos()], dim=-1)


PLACE_FEATURES = 6 + 8 * len(FREQUENCIES)


def relations(queries: Tensor, tokens: Tensor) -> Tensor:
    """Relative positions (K, T, 10) of tokens (K, T, 4) to queries (K, 4); boxes in frame units."""
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
    """Positions of M objects or queries in a padded batch of N scenes with T slots each."""

    slots: Tensor  # (M,) index into N x T
    shape: tuple[int, int]  # N, T

    @classmethod
    def of(cls, scenes: Tensor, count: int = 0) -> Rows:
        """Assign slots, given the scene of each row, (M,) in any order.

        `count` is a lower bound of N: the last scenes may be empty.
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
        """Values (M, ...) to (N, T, ...), padded with 0."""
        places = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        filled: Tensor = places.index_copy(0, self.slots, values).unflatten(0, self.shape)
        return filled

    def take(self, groups: Tensor) -> Tensor:
        """Groups (N, T, ...) to values (M, ...), the inverse of `put`."""
        return groups.flatten(0, 1)[self.slots]


class Tokens(NamedTuple):
    """T tokens of each of N scenes, and which of them K queries may read."""

    tokens: Tensor  # (N, T, D)
    lie: Tensor  # (K, T, 10), `relations` to the tokens of each query's scene
    seen: Tensor  # (K, T) bool, the tokens that a query may read, possibly none
    queries: Rows  # the scene of each query


class Reader(nn.Module):
    """Attention of queries to tokens, with relative positions, and a feed-forward layer.

    Tokens do not attend to each other, so a masked token cannot reach a query indirectly, and all
    queries, each with its own mask, are computed in one pass. As in the disentangled context
    transformer (Kasai et al., 2020, https://arxiv.org/abs/2001.05136), with boxes in place of
    positions in a sentence.

    Args:
        width: Length of queries and tokens.
        heads: Number of attention heads; must divide `width`.
        dropout: Dropout after attention and in the feed-forward layer.
        attention: `softmax`; or `sigmoid`, whose weights do not compete, so that evidence adds up
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
        if attention == "sigmoid":  # initial weights sum to about 1
            nn.init.constant_(self.bias.bias, -2.0)

    def forward(self, queries: Tensor, source: Tokens) -> Tensor:
        """Queries (K, D) and tokens to queries (K, D)."""
        heads, width, rows = self.heads, queries.shape[1] // self.heads, source.queries
        wanted = self.query(self.before(queries)).unflatten(1, (heads, width))
        keys = self.key(source.tokens).unflatten(2, (heads, width))
        values = self.value(source.tokens).unflatten(2, (heads, width))
        # q (k + A lie) = q k + (q A) lie: relative positions need no tensor of (K, T, D).
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
        """Weights (K, T, h) of scores (K, T, h), 0 for masked tokens."""
        if self.attention == "sigmoid":
            return scores.sigmoid() * seen[:, :, None]
        # With an additional empty token, so that a query may attend to nothing.
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
        nothing = scores.new_zeros(len(scores), 1, self.heads)
        return torch.cat([scores, nothing], dim=1).softmax(dim=1)[:, :-1]


def _per_head(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Weight (h, D/h, inputs) and bias (h, D/h) of a layer, split by attention head."""
    return linear.weight.unflatten(0, (heads, -1)), linear.bias.unflatten(0, (heads, -1))


class Patches(nn.Module):
    """Tokens of an image's square patches, with a small receptive field.

    A token depends on patches up to `reach` away, so one pass over the whole image serves all
    hidden regions: queries for a region mask the tokens that depend on it, see `touched`. Norms are
    over the channels of a patch, since other norms would depend on the whole image.

    Args:
        width: Length of a token.
        patch: Side of a patch, pixels.
        reach: Number of 3x3 convolutions over the patches.

    Raises:
        UserError: An option out of range.
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
        """Images (N, 3, H, W) to maps (N, D, ceil(H / patch), ceil(W / patch))."""
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.start(self.stem(padded))
        for step in self.near:
            maps = maps + step(maps)
        ended: Tensor = self.end(maps)
        return ended

    def touched(self, regions: Tensor) -> Tensor:
        """Tokens (K, h, w) bool that depend on any pixel of regions (K, H, W)."""
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
    """Boxes (h * w, 4) of the cells of an h x w grid, in units of the frame's long side.

    `frame` is the height and width that the grid covers, in these units. Boxes have the type and
    device of `like`.
    """
    rows = torch.arange(grid[0], device=like.device, dtype=like.dtype) * (frame[0] / grid[0])
    columns = torch.arange(grid[1], device=like.device, dtype=like.dtype) * (frame[1] / grid[1])
    top, left = torch.meshgrid(rows, columns, indexing="ij")
    boxes = [left, top, left + frame[1] / grid[1], top + frame[0] / grid[0]]
    return torch.stack(boxes, dim=-1).flatten(0, 1)


# Initial evidence is scaled down: a random early choice of scene types is hard to unlearn.
_INITIAL_SCALE = 0.2
_NAMES_STD = 0.5
_NEVER = -1e4  # log odds of a dropped type; finite, in case all types are dropped


class SceneKinds(nn.Module):
    """Mixture over latent scene types, `p(c | rest) = sum_k p(k | rest) p(c | k, box, rest)`.

    Visible objects add evidence for each type, `log p(k | rest) = b_k + sum_j e_k(class_j, box_j) +
    const`; each type has a class distribution of its own, by position. Types are latent and learned
    from co-occurrence (latent class analysis, Lazarsfeld and Henry, 1968; the output layer is a
    mixture of softmaxes, Yang et al., 2018, https://arxiv.org/abs/1711.03953). A few thousand
    scenes suffice, while attention alone needs many more to learn to multiply evidence.

    Args:
        num_classes: C.
        width: Width of the hidden layers.
        kinds: Number of types; too many do no harm.
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
        """Evidence (M, kinds), log odds, of objects by class (M,) and box (M, 4)."""
        place = self.place(place_features(boxes))
        evidence: Tensor = self.speak(torch.cat([self.names(classes), place], dim=1))
        return evidence

    def forward(self, hidden: Tensor, others: Tokens, logits: Tensor) -> Tensor:
        """Log-probabilities (K, C).

        Args:
            hidden: Boxes of the hidden objects, (K, 4).
            others: `evidence` as tokens, with the mask of each hidden object.
            logits: Logits common to all types, (K, C).
        """
        # Sum over the visible objects directly: subtracting masked ones from a total would round.
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
