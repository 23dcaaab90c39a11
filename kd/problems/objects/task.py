"""Tasks on objects: predict hidden objects from context, classify objects, label scenes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses.class_weights import median_frequency, positive_weights
from kd.losses.supervised import (
    cross_entropy_labelled,
    masked_bce,
    masked_cross_entropy,
    multilabel_bce,
)
from kd.metrics.multilabel import MultiLabelAP, present_classes
from kd.nn.cooccurrence import Objects
from kd.problems.base import Batch, Classes, Evaluator, Mask, Mean, Output
from kd.problems.objects.batch import ObjectTask, hidden_boxes, hidden_labels, image_rows
from kd.transforms.hide import Shape, class_maps, hide, normalise, regions_of, valid_pixels

ImageInputs = Literal["none", "whole", "each"]


@dataclass(frozen=True, kw_only=True)
class Classification(ObjectTask):
    """Classify the object in each box.

    Args:
        label_smoothing: Fraction of the target probability that is spread over all classes.
        appearance: Whether to also train the appearance head alone on the labels.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "context", "appearance")

    label_smoothing: float = 0.0
    appearance: bool = False

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return normalised images (N, 3, H, W) and regions (K, 5): batch index, x1, y1, x2, y2."""
        rows = image_rows(batch).to(torch.float32)
        return normalise(batch["images"]), torch.cat([rows[:, None], hidden_boxes(batch)], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `cross_entropy` of the combined logits, `appearance` of the appearance head."""
        labels = hidden_labels(batch)
        names = {"cross_entropy": "logits"}
        if self.appearance:
            names["appearance"] = "appearance"
        smoothing = self.label_smoothing
        losses = {
            name: cross_entropy_labelled(output[key], labels, label_smoothing=smoothing)
            for name, key in names.items()
        }
        return {name: Mean(loss, "labelled") for name, loss in losses.items()}


@dataclass(frozen=True, kw_only=True)
class SceneLabels(ObjectTask):
    """Multi-label classification of whole images.

    Args:
        pos_weight: Loss weight of classes in the image, relative to classes that are absent.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "context", "appearance")
    mask_names: ClassVar[Collection[str]] = ()

    pos_weight: float = 1.0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return normalised images (N, 3, H, W) and their unpadded areas as regions, (N, 5)."""
        height, width = batch["sizes"].to(torch.float32).unbind(dim=1)
        zero = torch.zeros_like(width)
        rows = torch.arange(len(width), device=width.device, dtype=torch.float32)
        return normalise(batch["images"]), torch.stack([rows, zero, zero, width, height], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `binary`, the binary cross-entropy of all classes over the labelled images."""
        logits = output["appearance"]  # before any softmax: classes do not exclude each other
        present, known = present_classes(batch, self.num_classes)
        weight = None
        if self.pos_weight != 1.0:
            weight = logits.new_full((self.num_classes,), self.pos_weight)
        loss = multilabel_bce(logits, present, known=known, pos_weight=weight)
        return {"binary": Mean(loss, "labelled_images")}

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """Return no masks, because no object is hidden."""
        return {}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return the log-probability of each class being in the image, (N, C)."""
        return F.logsigmoid(output["appearance"].float())

    def metric(self, classes: Classes) -> Evaluator:
        """Build the metric, mean average precision over the classes that occur."""
        return MultiLabelAP(self.num_classes, where=classes.where)


@dataclass(frozen=True, kw_only=True)
class ContextTask(ObjectTask):
    """Base class of tasks whose model gets one input per hidden object.

    `shape` is the shape of hidden regions; `segment` uses the objects' masks from the batch.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "dense")

    shape: Shape = "box"

    def outputs_per_region(self, size: int) -> int:
        """Return the number of output values for one input of `size` x `size` pixels."""
        return self.num_classes

    def regions(self, batch: Batch) -> Tensor:
        """Return masks of the hidden pixels, bool (K, H, W)."""
        return regions_of(batch, shape=self.shape)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return RGB images, 0 where hidden, with the region as fourth channel, (K, 4, H, W).

        Without hidden objects, return all images with an empty mask, (N, 4, H, W).
        """
        images = normalise(batch["images"])
        if "hidden" not in batch:
            return (F.pad(images, (0, 0, 0, 0, 0, 1)),)
        return (hide(images, image_rows(batch), self.regions(batch)),)

    def labelled_part(self, loss: Tensor, batch: Batch) -> Mean:
        """Rescale a mean over all inputs (0 for unlabelled ones) to a mean over labelled inputs."""
        known = hidden_labels(batch) >= 0
        return Mean(loss * (len(known) / known.sum().clamp(min=1)), "labelled")


@dataclass(frozen=True, kw_only=True)
class Context(ContextTask):
    """Classify the hidden object: logits (K, C), cross-entropy.

    Used for BlindNet's CNN and any trunk. Models that also output pixel logits, `dense`, have a
    second loss on visible objects.

    Args:
        label_smoothing: Fraction of the target probability that is spread over all classes.
        balance: Power of the class prior that is added to the logits in the loss, so that rare
            classes are predicted more often (logit adjustment, Menon et al., 2021,
            https://arxiv.org/abs/2007.07314).
        prior: Class fractions of the train objects, (C,), required if `balance` is not 0.
    """

    label_smoothing: float = 0.0
    balance: float = 0.0
    prior: tuple[float, ...] | None = None

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `cross_entropy` of labelled hidden objects, `visible` of any `dense` logits."""
        logits = output["logits"]
        if self.balance:
            assert self.prior is not None
            logits = logits + self.balance * logits.new_tensor(self.prior).log()
        loss = cross_entropy_labelled(
            logits, hidden_labels(batch), label_smoothing=self.label_smoothing
        )
        losses = {"cross_entropy": Mean(loss, "labelled")}
        if "dense" in output:
            losses["visible"] = self._visible(output["dense"], batch)
        return losses

    def _visible(self, logits: Tensor, batch: Batch) -> Mean:
        """Loss of the pixel logits (K, C, h, w) outside the hidden regions."""
        grid = (logits.shape[2], logits.shape[3])
        hidden = F.adaptive_max_pool2d(self.regions(batch).float()[:, None], grid)[:, 0] > 0
        targets = label_maps(batch, self.num_classes, grid)[image_rows(batch)]
        valid = _labelled_pixels(batch, grid)
        loss = masked_bce(logits, targets, hidden, valid=valid, hidden_weight=0.0)
        return self.labelled_part(loss, batch)


def label_maps(batch: Batch, num_classes: int, grid: tuple[int, int]) -> Tensor:
    """Rasterise the labelled boxes on a grid, one channel per class: bool (N, C, h, w)."""
    known = batch["labels"] >= 0
    height, width = batch["images"].shape[-2:]
    scale = batch["boxes"].new_tensor([grid[1] / width, grid[0] / height]).repeat(2)
    boxes, labels, images = (batch[name][known] for name in ("boxes", "labels", "image_of"))
    return class_maps(boxes * scale, labels, images, len(batch["images"]), num_classes, grid)


def image_pixels(batch: Batch, grid: tuple[int, int] | None = None) -> Tensor:
    """Mask the pixels inside the images, bool (N, H, W), or the cells of `grid`, (N, h, w)."""
    height, width = batch["images"].shape[-2:]
    pixels = valid_pixels(batch["sizes"], (height, width))
    if grid is None:
        return pixels
    return F.adaptive_max_pool2d(pixels.float()[:, None], grid)[:, 0] > 0


def _labelled_pixels(batch: Batch, grid: tuple[int, int] | None = None) -> Tensor:
    """`image_pixels` of each hidden object's image, (K, H, W); False for unlabelled objects."""
    known = hidden_labels(batch) >= 0
    return image_pixels(batch, grid)[image_rows(batch)] & known[:, None, None]


@dataclass(frozen=True, kw_only=True)
class ContextPixels(ContextTask):
    """Classify each pixel with one sigmoid per class (BlindNet): logits (K, C, H, W).

    Targets are all boxes, hidden or not. The posterior is the sum of each class's sigmoids over the
    hidden region, normalised over the classes. `hidden_weight` is the loss weight of the hidden
    region, relative to 1 for the rest of the image.
    """

    hidden_weight: float = 5.0

    def outputs_per_region(self, size: int) -> int:
        return self.num_classes * size**2

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `masked_bce` over the pixels inside the images of labelled objects."""
        height, width = batch["images"].shape[-2:]
        loss = masked_bce(
            output["logits"],
            label_maps(batch, self.num_classes, (height, width))[image_rows(batch)],
            self.regions(batch),
            valid=_labelled_pixels(batch),
            hidden_weight=self.hidden_weight,
        )
        return {"masked_bce": self.labelled_part(loss, batch)}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return the log-posterior of the hidden objects, (K, C)."""
        regions = self.regions(batch).float()
        scores = torch.einsum("kchw,khw->kc", output["logits"].float().sigmoid(), regions)
        return _log_fractions(scores)


@dataclass(frozen=True, kw_only=True)
class ContextMap(ContextTask):
    """Segment the image: logits (K, 1 + C, H, W), background first, cross-entropy.

    Used for BlindNet's pixel-wise ResNet-18. Targets are the batch's `class_maps`
    (`kd.formats.class_maps`), which include the hidden object. The posterior is the softmax of the
    object classes, summed over the hidden region and normalised over the classes.

    Args:
        hidden_weight: Loss weight of the hidden region, relative to 1 for the rest of the image.
        class_weights: Power of the class weights (`median_frequency` of `pixel_fractions`); 0:
            none.
        pixel_fractions: Class fractions of the train pixels, (1 + C,), background first, required
            for class weights.
    """

    class_scores: ClassVar[Collection[str]] = ()  # the extra channel is the background

    hidden_weight: float = 5.0
    class_weights: float = 0.0
    pixel_fractions: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_power(self.class_weights)

    def outputs_per_region(self, size: int) -> int:
        return (1 + self.num_classes) * size**2

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `pixel_cross_entropy` over the pixels inside the images of labelled objects."""
        logits, weights = output["logits"], None
        if self.class_weights:
            assert self.pixel_fractions is not None
            numbers = median_frequency(self.pixel_fractions, power=self.class_weights)
            weights = logits.new_tensor(numbers, dtype=torch.float32)
        loss = masked_cross_entropy(
            logits,
            batch["class_maps"][image_rows(batch)].long(),
            self.regions(batch),
            valid=_labelled_pixels(batch),
            class_weights=weights,
            hidden_weight=self.hidden_weight,
        )
        return {"pixel_cross_entropy": self.labelled_part(loss, batch)}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return the log-posterior of the hidden objects, (K, C)."""
        regions = self.regions(batch).float()
        posterior = output["logits"].float().softmax(dim=1)[:, 1:]
        return _log_fractions(torch.einsum("kchw,khw->kc", posterior, regions))


@dataclass(frozen=True, kw_only=True)
class ContextScene(ContextTask):
    """Predict all classes of the scene, hidden object included: multi-label logits (K, C), BCE.

    Used for BlindNet's multi-label ResNet-18. The posterior of the hidden object is the
    probabilities of all classes, normalised. It overestimates the classes of visible objects.

    Args:
        class_weights: Power of the loss weights of present classes (`positive_weights` of
            `image_fractions`); 0: none.
        image_fractions: Fractions of train images with each class, (C,), required for class
            weights.
    """

    class_weights: float = 0.0
    image_fractions: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_power(self.class_weights)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `multilabel_bce`, a mean over the labelled hidden objects."""
        logits, weights = output["logits"], None
        if self.class_weights:
            assert self.image_fractions is not None
            numbers = positive_weights(self.image_fractions, power=self.class_weights)
            weights = logits.new_tensor(numbers, dtype=torch.float32)
        targets = present_classes(batch, self.num_classes)[0][image_rows(batch)]
        known = hidden_labels(batch) >= 0
        loss = multilabel_bce(logits, targets, known=known, pos_weight=weights)
        return {"multilabel_bce": Mean(loss, "labelled")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Return the log-posterior of the hidden objects, (K, C)."""
        return _log_fractions(output["logits"].float().sigmoid())


def _check_power(class_weights: float) -> None:
    if not 0 <= class_weights <= 1:
        raise UserError(f"class_weights must be in 0..1, got {class_weights}")


def _log_fractions(scores: Tensor) -> Tensor:
    """Divide each row by its sum and take the log, (K, C)."""
    scores = scores.clamp(min=1e-6)
    return (scores / scores.sum(dim=1, keepdim=True)).log()


@dataclass(frozen=True, kw_only=True)
class SceneTokens(Context):
    """Classify hidden objects from classes and boxes of other objects, from pixels, or both.

    Objects are hidden one at a time. All other objects are input, except those in the batch's
    `also_hidden`. `image_inputs` selects the images that the model gets, see `inputs`.
    """

    image_inputs: ImageInputs = "none"

    def inputs(self, batch: Batch) -> tuple[Objects | Tensor, ...]:  # type: ignore[override]
        """Return objects, indices of the hidden ones (K,), normalised images and hidden regions.

        Regions are bool (K, H, W). Images depend on `image_inputs`: `whole` gives unmasked images
        (N, 3, H, W), `each` gives (K, 3, H, W) with 0 in the hidden region, and `none` gives empty
        tensors.
        """
        objects = scene_objects(batch)
        images = batch["images"]
        if self.image_inputs == "none":
            empty = images.new_zeros((0, 3, 1, 1), dtype=torch.float32)
            return objects, batch["hidden"], empty, empty[:, 0].bool()
        regions = self.regions(batch)
        images = normalise(images)
        if self.image_inputs == "each":
            images = images[image_rows(batch)].mul_(~regions[:, None])
        return objects, batch["hidden"], images, regions

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """Compute `cross_entropy` of labelled hidden objects, `visible` of any `dense` logits."""
        losses = super().losses({"logits": output["logits"]}, batch)
        if "dense" in output:
            losses["visible"] = self._all_boxes(output["dense"], batch)
        return losses

    def _all_boxes(self, logits: Tensor, batch: Batch) -> Mean:
        """Loss of pixel logits (N, C, h, w) of whole images, with all boxes as targets."""
        grid = (logits.shape[2], logits.shape[3])
        known = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        known[batch["image_of"][batch["labels"] >= 0]] = True
        valid = image_pixels(batch, grid) & known[:, None, None]
        targets, hidden = label_maps(batch, self.num_classes, grid), torch.zeros_like(valid)
        loss = masked_bce(logits, targets, hidden, valid=valid, hidden_weight=0.0)
        return Mean(loss, "images")


def scene_objects(batch: Batch) -> Objects:
    """Return the objects of a batch as model input, with boxes as fractions of their image."""
    rows = batch["image_of"]
    sides = batch["sizes"][rows].to(torch.float32)[:, [1, 0, 1, 0]]
    boxes = (batch["boxes"] / sides).clamp(0.0, 1.0)
    visible = batch["labels"] >= 0
    if "also_hidden" in batch:
        visible = visible & ~batch["also_hidden"]
    return Objects(batch["labels"], visible, boxes, sides[:, 0] / sides[:, 1], rows)
