"""A masked-token transformer over a scene's objects and pixels as a context teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.cooccurrence import NaiveBayes, Objects
from kd.nn.multi_stride_trunk import LevelledTrunk, levelled
from kd.nn.regions import Surroundings
from kd.nn.scene_transformer import (
    PLACE_FEATURES,
    Patches,
    Reader,
    Rows,
    SceneKinds,
    Tokens,
    place_boxes,
    place_features,
    relations,
)
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import BlindTrunk, Trunk, rgb_alone

Pixels = Literal["patches", "trunk"]


class SceneTransformer(nn.Module):
    """Transformer in which a query for each hidden object attends to the rest of the scene.

    The query is computed from the box of the hidden object. The tokens of the scene are the classes
    and boxes of the other objects, patches of the image or cells of a trunk's map, or both. Tokens
    do not attend to each other (`kd.nn.scene_transformer.Reader`), so one pass over a scene gives
    the posterior of each object with only this object hidden.

    Attributes:
        task: Name of the task that fits input and output.
        image_inputs: Which images are part of the input: `none`; `whole`, the N images, in which
            hidden regions are masked inside the network; or `each`, for a trunk, K images in each
            of which one object is hidden.
        reads_labels: Whether the classes of the other objects are part of the input.
    """

    task = "scene_tokens"

    def __init__(
        self,
        num_classes: int,
        *,
        width: int,
        readers: Sequence[Reader],
        annotations: bool,
        patches: Patches | None,
        trunk: LevelledTrunk | None,
        around: Surroundings | None,
        counts: NaiveBayes | None,
        kinds: SceneKinds | None,
        dense: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_classes, self.reads_labels = num_classes, annotations
        self.image_inputs = "whole" if patches else "each" if trunk else "none"
        self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self.place = nn.Sequential(
            nn.Linear(PLACE_FEATURES, width), nn.GELU(), nn.Linear(width, width)
        )
        self.readers = nn.ModuleList(readers)
        self.names = nn.Embedding(num_classes, width) if annotations else None
        self.object_norm = nn.LayerNorm(width) if annotations else None
        self.patches, self.trunk, self.around = patches, trunk, around
        self.counts, self.kinds = counts, kinds
        if patches or trunk:
            self.patch_place = nn.Linear(PLACE_FEATURES, width)
        if trunk and around:
            self.project = nn.Conv2d(trunk.level_channels[-1], width, 1)
            self.look_around = nn.Sequential(nn.Dropout(dropout), nn.Linear(around.width, width))
            self.direct = nn.Linear(around.width, num_classes)
            nn.init.normal_(self.direct.weight, std=1e-3)
        self.dense = nn.Conv2d(width, num_classes, 1) if dense else None
        self.end = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout))
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=1e-3)

    def fit(self, objects: Objects) -> None:
        """Fit naive Bayes to the objects of the training images, if built with `counts`."""
        if self.counts is not None:
            self.counts.fit(objects)

    def forward(
        self, objects: Objects, hidden: Tensor, images: Tensor, regions: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """Compute the posterior of each hidden object, conditioned on all other objects.

        Args:
            objects: Objects of N images. The class of a hidden object is evidence for the other
                objects only.
            hidden: (K,) indices of the hidden objects.
            images: Normalised images, (N, 3, H, W) if `image_inputs` is `whole`, or (K, 3, H, W)
                with 0 in the hidden region if it is `each`.
            regions: (K, H, W) bool, the hidden regions.

        Returns:
            Logits (K, C); with `dense` a dict of `logits` and `dense` (N, C, h, w), pixel logits on
            the grid of the patches.
        """
        frames = _frames(objects)
        boxes = objects.boxes * frames
        targets = boxes[hidden]
        place = self.place(place_features(targets))
        queries, sources, extra = self.mask + place, [], []
        dense: Tensor | None = None
        slots = Rows.of(objects.image_of) if self.names is not None else None
        if slots is not None:
            sources.append(self._object_tokens(objects, slots, boxes, hidden))
        if self.patches is not None:
            maps = self.patches(images)
            dense = None if self.dense is None else self.dense(maps)
            rows, blind = objects.image_of[hidden], self.patches.touched(regions)
            sources.append(self._map_tokens(maps, images, targets, frames[hidden], rows, blind))
        elif self.trunk is not None:
            assert self.around is not None
            levels = self.trunk(images)
            rows = torch.arange(len(hidden), device=hidden.device)
            size = max(images.shape[2:])
            around = self.around(levels, targets * size, rows, frames[hidden, :2] * size)
            queries = queries + self.look_around(around)
            extra.append(self.direct(around))
            maps = self.project(levels[-1])
            sources.append(self._map_tokens(maps, images, targets, frames[hidden], rows, None))
        for reader in self.readers:
            for source in sources:
                queries = reader(queries, source)
        extra.append(self.head(self.end(queries)))
        if self.counts is not None:
            extra.append(self.counts(objects, hidden))
        logits = torch.stack([part.float() for part in extra]).sum(dim=0)
        if self.kinds is not None:
            assert slots is not None
            evidence = slots.put(self.kinds.evidence(objects.classes.clamp(min=0), boxes))
            logits = self.kinds(targets, sources[0]._replace(tokens=evidence), logits)
        return logits if dense is None else {"logits": logits, "dense": dense}

    def scene_trunk(self) -> Trunk:
        """Return the patch network or the trunk, for a student to start from.

        Raises:
            UserError: The input of the teacher is annotations only.
        """
        if self.trunk is not None:
            return self.trunk.trunk
        if self.patches is None:
            raise UserError("scene_transformer: without pixels there is no trunk to start from")
        step = (self.patches, len(self.mask), self.patches.patch)
        return BlindTrunk("scene_transformer", [step], see=rgb_alone)

    def _object_tokens(self, objects: Objects, rows: Rows, boxes: Tensor, hidden: Tensor) -> Tokens:
        """Compute a token for each object; a query may attend to the visible other objects."""
        assert self.names is not None and self.object_norm is not None
        named = self.names(objects.classes.clamp(min=0)) + self.place(place_features(boxes))
        tokens = rows.put(self.object_norm(named))
        there = rows.put(objects.visible & (objects.classes >= 0))
        mine = objects.image_of[hidden]
        slots = torch.arange(rows.shape[1], device=mine.device) + mine[:, None] * rows.shape[1]
        itself = rows.slots[hidden][:, None] == slots
        lie = relations(boxes[hidden], rows.put(boxes)[mine])
        return Tokens(tokens, lie, there[mine] & ~itself, Rows.of(mine, len(tokens)))

    def _map_tokens(
        self, maps: Tensor, images: Tensor, targets: Tensor, frames: Tensor, rows: Tensor,
        blind: Tensor | None,
    ) -> Tokens:  # fmt: skip
        """Convert the cells of a map to tokens, with masks for padding and hidden cells."""
        grid = (maps.shape[2], maps.shape[3])
        step = max(-(-images.shape[2] // grid[0]), -(-images.shape[3] // grid[1]))
        size = max(images.shape[2:])
        covered = (grid[0] * step / size, grid[1] * step / size)
        boxes = place_boxes(grid, covered, targets)  # (h * w, 4)
        tokens = maps.flatten(2).transpose(1, 2) + self.patch_place(place_features(boxes))
        seen = (boxes[:, :2] < frames[:, None, 2:] - 1e-6).all(dim=2)  # (K, h * w)
        if blind is not None:
            seen = seen & ~blind.flatten(1)
        lie = relations(targets, boxes.expand(len(targets), -1, -1))
        return Tokens(tokens, lie, seen, Rows.of(rows, len(tokens)))


def _frames(objects: Objects) -> Tensor:
    """Width, height, width, height (M, 4) of the image that contains each object.

    The unit is the long side of the image.
    """
    wide = objects.aspects.clamp(max=1.0)
    high = objects.aspects.reciprocal().clamp(max=1.0)
    return torch.stack([wide, high, wide, high], dim=1)


def scene_transformer(
    num_classes: int,
    *,
    annotations: bool = True,
    pixels: Pixels | None = None,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    attention: Literal["softmax", "sigmoid"] = "sigmoid",
    dropout: float = 0.1,
    patch: int = 4,
    reach: int = 1,
    dense: bool = False,
    trunk: str = "mobilenet_v2",
    weights: str | None = None,
    levels: int = 2,
    margins: Sequence[float] = (0.5,),
    min_ring: float = 16.0,
    frozen: str | None = "all",
    remember: bool = False,
    counts: bool = False,
    kinds: int = 0,
) -> SceneTransformer:
    """Build a transformer over tokens of the other objects, of the image, or of both.

    Args:
        num_classes: Number of classes, C.
        annotations: Whether the classes and boxes of the other objects are tokens.
        pixels: How the image is converted to tokens. `patches` are learned from scratch, and one
            pass serves all objects of an image. `trunk` runs a trunk for each object, on a copy of
            the image in which the object is hidden. Null for annotations only.
        width: Length of tokens.
        depth: Number of attention layers (`Reader`).
        heads: Number of attention heads.
        attention: Whether attention weights sum to 1 (`softmax`) or are independent (`sigmoid`).
        dropout: Dropout probability in the attention layers and before the head.
        patch: Side of a patch, pixels.
        reach: How far the receptive field of a patch extends to each side, in patches.
        dense: Whether patches are also trained to classify visible objects; the task then has a
            loss `visible`.
        trunk: Name of the trunk: mobilenet_v2, timm/NAME, ...
        weights: Weights of the trunk: "imagenet", a file, or null for random weights.
        levels: Number of strides of the trunk whose maps are pooled around the object.
        margins: Thickness of each pooled ring, as a fraction of the box's width and height.
        min_ring: Smallest thickness of a ring, pixels.
        frozen: "all", the path of the last step of the trunk to freeze, or null.
        remember: Whether to cache the outputs of a frozen trunk in memory.
        counts: Whether to add the output of naive Bayes (`kd.nn.cooccurrence`), fitted to the
            training images, to the logits. Without annotations it uses only the box's position and
            size.
        kinds: Number of latent scene types of the output mixture (`SceneKinds`); 0 for no mixture.

    Raises:
        UserError: An option is out of range, or there are neither annotations nor pixels.
    """
    if not annotations and pixels is None:
        raise UserError(
            "scene_transformer: there is no input; set annotations to true, pixels to patches or "
            "trunk, or both"
        )
    if dense and pixels != "patches":
        raise UserError("scene_transformer: dense needs pixels: patches")
    if kinds and not annotations:
        raise UserError(
            "scene_transformer: kinds are learned from annotations; set annotations to true"
        )
    at_least("scene_transformer", width=(width, 1), depth=(depth, 1), kinds=(kinds, 0))
    if not 0 <= dropout < 1:
        raise UserError(f"scene_transformer: dropout must be in [0, 1), got {dropout}")
    seen = None
    if pixels == "trunk":
        seen = levelled(
            build_trunk(trunk, weights=weights), levels=levels, frozen=frozen,
            batch_norm_frozen=frozen is not None, remember=remember,
        )  # fmt: skip
    around = None
    if seen is not None:
        around = Surroundings(
            seen.level_channels, seen.level_strides, margins=margins, min_ring=min_ring, inside=True
        )
    evidence: Sequence[Literal["company", "place", "size"]] = ("place", "size")
    return SceneTransformer(
        num_classes,
        width=width,
        readers=[
            Reader(width, heads=heads, dropout=dropout, attention=attention) for _ in range(depth)
        ],
        annotations=annotations,
        patches=Patches(width, patch=patch, reach=reach) if pixels == "patches" else None,
        trunk=seen,
        around=around,
        counts=NaiveBayes(num_classes, evidence=("company", *evidence) if annotations else evidence)
        if counts
        else None,
        kinds=SceneKinds(num_classes, width=width, kinds=kinds) if kinds else None,
        dense=dense,
        dropout=dropout,
    )
