"""Queries that read the tokens of a scene, each without what it may not see."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
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


class Rows(NamedTuple):
    """Where each of M objects or queries stands among those of its scene, side by side."""

    slots: Tensor  # (M,) its place among all N x T
    shape: tuple[int, int]  # N, T

    @classmethod
    def of(cls, scenes: Tensor, count: int = 0) -> Rows:
        """Count those of each scene.

        Args:
            scenes: The scene of each, (M,), in any order.
            count: N, where the last scenes may have none.
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
        """Values (M, ...) to (N, T, ...), 0 beyond."""
        places = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        filled: Tensor = places.index_copy(0, self.slots, values).unflatten(0, self.shape)
        return filled

    def take(self, groups: Tensor) -> Tensor:
        """The reverse: (N, T, ...) to (M, ...)."""
        return groups.flatten(0, 1)[self.slots]


class Tokens(NamedTuple):
    """What queries may read, N scenes of T tokens; K queries."""

    tokens: Tensor  # (N, T, D)
    lie: Tensor  # (K, T, 10), `relations` to each token of its scene
    seen: Tensor  # (K, T) bool, what a query may see; possibly nothing
    queries: Rows  # which scene's tokens each query reads


def make_tokens(tokens: Tensor, rows: Tensor, lie: Tensor, seen: Tensor) -> Tokens:
    """Put together what queries read.

    Args:
        tokens: (N, T, D).
        rows: The scene of each query, (K,).
        lie: (K, T, 10).
        seen: (K, T) bool.
    """
    return Tokens(tokens, lie, seen, Rows.of(rows, len(tokens)))


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

    def forward(self, queries: Tensor, source: Tokens) -> Tensor:
        """One layer: queries (K, D) and what they may read to queries (K, D)."""
        heads, width, rows = self.heads, queries.shape[1] // self.heads, source.queries
        asked = self.query(self.before(queries)).unflatten(1, (heads, width))
        keys = self.key(source.tokens).unflatten(2, (heads, width))
        values = self.value(source.tokens).unflatten(2, (heads, width))
        # q (k + A lie) = q k + (q A) lie: how a token lies is never made as long as a token.
        turned, shift = _per_head(self.lie_key, heads)
        scores = rows.take(torch.einsum("nqhd,nthd->nqth", rows.put(asked), keys))
        lying = torch.einsum("khd,hdr->khr", asked, turned)
        scores = scores + torch.einsum("khr,ktr->kth", lying, source.lie)
        scores = scores + torch.einsum("khd,hd->kh", asked, shift)[:, None]
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
        """(K, T, h) of scores (K, T, h); 0 for what is not seen."""
        if self.attention == "sigmoid":
            return scores.sigmoid() * seen[:, :, None]
        # Beside the tokens there is nothing, which a query may read as well.
        scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
        nothing = scores.new_zeros(len(scores), 1, self.heads)
        return torch.cat([scores, nothing], dim=1).softmax(dim=1)[:, :-1]


def _per_head(linear: nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Weight (h, D/h, inputs) and bias (h, D/h) of each head's part of a layer."""
    return linear.weight.unflatten(0, (heads, -1)), linear.bias.unflatten(0, (heads, -1))


class Patches(nn.Module):
    """Tokens of squares of a picture, each blind to all but its near neighbours.

    No token sees further than `reach` patches, so that one pass over the whole picture serves
    every hidden region: whoever may not see a region passes over the tokens that its pixels have
    got into, `touched`. Norms are by place (over channels), since any other would carry a trace of
    the whole picture everywhere.

    Args:
        width: Length of a token.
        patch: Side of a square, pixels.
        reach: How many 3x3 convolutions over the squares, each a square further.
    """

    def __init__(self, width: int, *, patch: int, reach: int) -> None:
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
        """Pictures (N, 3, H, W) to maps (N, D, ceil(H / patch), ceil(W / patch))."""
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        maps = self.start(self.stem(padded))
        for step in self.near:
            maps = maps + step(maps)
        ended: Tensor = self.end(maps)
        return ended

    def touched(self, regions: Tensor) -> Tensor:
        """(K, h, w) bool: the tokens that any pixel of the regions (K, H, W) has got into."""
        height, width = regions.shape[1:]
        padded = F.pad(regions.float(), (0, -width % self.patch, 0, -height % self.patch))
        hit = F.max_pool2d(padded[:, None], self.patch)
        if self.reach:
            hit = F.max_pool2d(hit, 2 * self.reach + 1, stride=1, padding=self.reach)
        return hit[:, 0] > 0


class _PlaceNorm(nn.Module):
    """Layer norm over the channels of each place of a map (N, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        normed: Tensor = self.norm(maps.movedim(1, -1)).movedim(-1, 1)
        return normed


def place_boxes(grid: tuple[int, int], frame: tuple[float, float], like: Tensor) -> Tensor:
    """(h * w, 4) boxes of a map's places, in units of the frame's long side.

    Args:
        grid: h and w.
        frame: Height and width that the grid covers, in those units.
        like: Of the wanted type and device.
    """
    rows = torch.arange(grid[0], device=like.device, dtype=like.dtype) * (frame[0] / grid[0])
    columns = torch.arange(grid[1], device=like.device, dtype=like.dtype) * (frame[1] / grid[1])
    top, left = torch.meshgrid(rows, columns, indexing="ij")
    boxes = [left, top, left + frame[1] / grid[1], top + frame[0] / grid[0]]
    return torch.stack(boxes, dim=-1).flatten(0, 1)


def check_patches(patch: int, reach: int) -> None:
    """Refuse sizes that are none.

    Raises:
        UserError: One of them is.
    """
    if patch < 1 or reach < 0:
        raise UserError(
            f"scene_transformer: patch {patch} must be 1 or more, reach {reach} 0 or more"
        )


# The first guesses at a scene's kind are nearly alike: kinds chosen by chance before there is
# anything to know about them are hard to leave again.
_TIMID = 0.2
_NAMES_STD = 0.5
_NEVER = -1e4  # log odds, finite where every kind is dropped


class SceneKinds(nn.Module):
    """`p(c | rest) = sum_k p(k | rest) p(c | k, place, rest)`, k a kind of scene.

    Each visible object is evidence for each kind, and evidence adds up, `log p(k | rest) =
    b_k + sum_j e_k(class_j, box_j) + const`; a kind says by itself what belongs where in it. The
    kinds are never told: they are what explains best which objects come together (latent class
    analysis, Lazarsfeld and Henry, 1968; as the end of a network a mixture of softmaxes, Yang et
    al., 2018, https://arxiv.org/abs/1711.03953). A few thousand scenes are enough to find them,
    where attention alone would need many more to learn to multiply evidence.

    Args:
        num_classes: C.
        width: Of the hidden layers.
        kinds: How many, more than there may be: kinds that are alike cost nothing.
        dropout: Share of the kinds that an answer must do without in training, so that none is
            the only one of its sort.
    """

    def __init__(self, num_classes: int, *, width: int, kinds: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.names = nn.Embedding(num_classes, width)
        self.place = nn.Sequential(nn.Linear(PLACE_FEATURES, width), nn.GELU())
        said = nn.Linear(width, kinds)
        self.speak = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), said)
        self.belongs = nn.Sequential(
            nn.Linear(PLACE_FEATURES, width), nn.GELU(), nn.Linear(width, kinds * num_classes)
        )
        self.often = nn.Parameter(torch.zeros(kinds))
        nn.init.normal_(self.names.weight, std=_NAMES_STD)
        with torch.no_grad():
            said.weight.mul_(_TIMID)

    def evidence(self, classes: Tensor, boxes: Tensor) -> Tensor:
        """What each object says of each kind, log odds (M, kinds).

        Args:
            classes: (M,).
            boxes: (M, 4) xyxy in units of the frame.
        """
        place = self.place(place_features(boxes))
        said: Tensor = self.speak(torch.cat([self.names(classes), place], dim=1))
        return said

    def forward(self, asked: Tensor, company: Tokens, logits: Tensor) -> Tensor:
        """Log-probabilities (K, C).

        Args:
            asked: Boxes of the hidden objects, (K, 4).
            company: `evidence` as tokens, and what of it each hidden object's answer may know.
            logits: (K, C) what is said for each class whatever the kind of scene.
        """
        # A sum over what is seen, and nothing taken away again: exact, to the last bit.
        seen = company.queries.put(company.seen.to(company.tokens.dtype))
        votes = company.queries.take(torch.einsum("nqt,ntk->nqk", seen, company.tokens))
        kind = votes + self.often
        if self.training and self.dropout:
            kind = kind.masked_fill(torch.rand_like(kind) < self.dropout, _NEVER)
        belongs = self.belongs(place_features(asked)).unflatten(1, (-1, self.num_classes))
        of_kind = (belongs + logits[:, None]).float().log_softmax(dim=2)
        joint = kind.float().log_softmax(dim=1)[:, :, None] + of_kind
        mixed: Tensor = joint.logsumexp(dim=1)
        return mixed
