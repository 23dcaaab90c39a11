"""Feature trunks by name: any torchvision classifier before its pooling, or any model of timm."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from kd.errors import UserError
from kd.nn.freeze import evaluating, freeze
from kd.nn.timm_trunk import PREFIX as TIMM
from kd.nn.timm_trunk import build_timm_trunk
from kd.nn.trunk_base import Trunk
from kd.nn.weights import load_trunk_weights, widen_first_convolution
from kd.registry import look_up, suggestion
from kd.transforms.hide import IMAGENET_MEAN, IMAGENET_STD


def slim(network: nn.Module, width: float, *, what: str) -> None:
    """Scale the channels of every convolution and batch norm by `width`, in place.

    The number of image channels does not change, and linear layers are not replaced. Convolutions
    are initialised as in He et al. (2015), https://arxiv.org/abs/1502.01852. Raise a UserError,
    prefixed with `what`, if a scaled number of channels is not an integer or a layer is not
    supported.
    """
    image_channels = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))

    def part(channels: int) -> int:
        fewer = channels * width
        if fewer < 1 or fewer != int(fewer):
            raise UserError(f"{what}: width {width:g} leaves {fewer:g} of {channels} channels")
        return int(fewer)

    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm | nn.MultiheadAttention):
                raise UserError(f"{what}: width is for networks of convolutions and batch norms")
            if isinstance(child, nn.BatchNorm2d):
                new: nn.Module = nn.BatchNorm2d(part(child.num_features), child.eps, child.momentum)
            elif isinstance(child, nn.Conv2d):
                inputs, kept = child.in_channels, ("kernel_size", "stride", "padding", "dilation")
                new = nn.Conv2d(
                    inputs if inputs == image_channels else part(inputs),
                    part(child.out_channels),
                    groups=1 if child.groups == 1 else part(child.groups),
                    bias=child.bias is not None,
                    **{name: getattr(child, name) for name in kept},
                )
                nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
                if new.bias is not None:
                    nn.init.zeros_(new.bias)
            else:
                continue
            setattr(parent, name, new)


HEADS = frozenset({"avgpool", "classifier", "fc", "head", "heads", "dropout", "flatten", "permute"})
AUXILIARY = frozenset({"aux1", "aux2", "AuxLogits"})
CONTAINERS = frozenset({"features", "layers", "trunk_output"})  # modules whose children are steps
# Side of the image that strides are measured with. It is large, so that the border that unpadded
# stems lose does not matter.
PROBE = 896


class TorchvisionTrunk(Trunk):
    """A torchvision classifier without its pooling and classification layers.

    The children have the same names as in torchvision, so that its weight files can be loaded. The
    output is (N, C, h, w) for all families, including Swin and vision transformers. If a
    distillation term reads a step inside a transformer, it gets torchvision's layout.
    """

    def __init__(self, name: str, classifier: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.tokens = isinstance(classifier, models.VisionTransformer)
        self.channels_last = isinstance(classifier, models.SwinTransformer)
        self.final_relu = isinstance(classifier, models.DenseNet)
        self.half_range = isinstance(classifier, models.GoogLeNet | models.Inception3)
        self.order = tuple(
            child for child, _ in classifier.named_children() if child not in HEADS | AUXILIARY
        )
        for child in self.order:
            self.add_module(child, getattr(classifier, child))
        if isinstance(classifier, models.VisionTransformer):
            self.order = ("conv_proj", "encoder")
            self.class_token = classifier.class_token
        self.measure()
        self._published_strides = self.step_strides

    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        for child in self.order:
            module = getattr(self, child)
            if child in CONTAINERS and isinstance(module, nn.Sequential):
                for name, inner in module.named_children():
                    yield f"{child}.{name}", inner
            else:
                yield child, module

    def forward(self, images: Tensor) -> Tensor:
        *_, (last, _) = self.steps()
        return self.forward_at(images, [last])[0]

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        return self.forward_at(images, [self.last_step(stride) for stride in self.level_strides])

    def forward_at(self, images: Tensor, paths: Sequence[str]) -> list[Tensor]:
        """Compute maps (N, C, h, w) after the given steps; a vision transformer has only one."""
        if self.tokens:
            return [self._token_grid(images)] * len(paths)
        features = self._to_half_range(images)
        maps: dict[str, Tensor] = {}
        for path, step in self.steps():
            features = step(features)
            if path in paths:
                maps[path] = features.permute(0, 3, 1, 2) if self.channels_last else features
        if self.final_relu and path in maps:
            maps[path] = F.relu(features)
        return [maps[path] for path in paths]

    def stages(self, *, first: bool = False) -> list[tuple[str, int]]:
        """Return path and channels of the last step at each stride, finest first.

        The strides are those of the published network, even if the option `stride` of `build_trunk`
        removed some of them.

        Args:
            first: Return the first step at each stride instead.
        """
        found: dict[int, tuple[str, int]] = {}
        for path, channels in self._step_channels.items():
            stride = self._published_strides[path]
            if not (first and stride in found):
                found[stride] = (path, channels)
        return [found[stride] for stride in sorted(found)]

    def last_step(self, stride: int) -> str:
        return {stride: path for path, stride in self.step_strides.items()}[stride]

    def measure(self) -> None:
        """Determine channels and strides after each step by running the trunk on a meta tensor."""
        in_channels = next(m.in_channels for m in self.modules() if isinstance(m, nn.Conv2d))
        tensors = itertools.chain(self.named_parameters(), self.named_buffers())
        on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors}
        images = torch.empty(1, in_channels, PROBE, PROBE, device="meta")
        shapes: list[torch.Size] = []
        with contextlib.ExitStack() as hooks, evaluating(self), torch.no_grad():
            for _, step in self.steps():
                handle = step.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
                hooks.callback(handle.remove)
            last = torch.func.functional_call(self, on_meta, (images,))
        if self.tokens:
            shapes = [last.shape] * len(self.order)
        side, depth = (1, 3) if self.channels_last else (2, 1)
        # Round to powers of two, because unpadded stems lose a border. The patch of a vision
        # transformer may have any size.
        strides = [
            PROBE // one[side] if self.tokens else 2 ** round(math.log2(PROBE / one[side]))
            for one in shapes
        ]
        paths = [path for path, _ in self.steps()]
        self.step_strides = dict(zip(paths, strides, strict=True))
        self._step_channels = dict(zip(paths, (one[depth] for one in shapes), strict=True))
        last_of = {stride: self._step_channels[path] for path, stride in self.step_strides.items()}
        self.channels, self.stride = last.shape[1], strides[-1]
        self.level_strides = tuple(sorted(stride for stride in last_of if stride > 1))
        self.level_channels = tuple(last_of[stride] for stride in self.level_strides)

    def cut(self, until: str) -> None:
        paths = [path for path, _ in self.steps()]
        if until not in paths or self.tokens:
            raise UserError(f"{self.name} has no step {until!r}{suggestion(until, paths)}")
        for path in paths[paths.index(until) + 1 :]:
            parent, _, child = path.rpartition(".")
            delattr(self.get_submodule(parent), child)
        self.order = tuple(child for child in self.order if child in self._modules)
        self.final_relu = self.final_relu and until == paths[-1]
        self.measure()

    def _to_half_range(self, images: Tensor) -> Tensor:
        """Convert images from ImageNet's mean and standard deviation to Inception's range -1..1."""
        if not self.half_range or images.shape[1] != 3:
            return images
        deviation = images.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
        mean = images.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        return (images * deviation + mean - 0.5) / 0.5

    def _token_grid(self, images: Tensor) -> Tensor:
        """Compute the output tokens of a vision transformer, arranged as a map (N, D, h, w)."""
        patches: Tensor = self.get_submodule("conv_proj")(images)  # (N, D, h, w)
        grid = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)  # (N, h*w, D)
        class_token: Any = self.class_token  # a meta tensor while `measure` runs
        tokens = torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        encoder: Any = self.encoder
        positions = _fit_positions(encoder.pos_embedding, grid)
        encoded: Tensor = encoder.ln(encoder.layers(encoder.dropout(tokens + positions)))
        return encoded[:, 1:].transpose(1, 2).reshape(images.shape[0], -1, *grid)


def build_trunk(
    name: str,
    *,
    weights: str | None = None,
    in_channels: int = 3,
    grey: bool = False,
    stride: int | None = None,
    dilate: bool = False,
    width: float = 1.0,
    until: str | None = None,
) -> Trunk:
    """Build a feature trunk.

    Models that work at one input size only cannot be trunks. For the licences of timm's weights see
    `kd.nn.timm_trunk`.

    Args:
        name: A torchvision classifier, such as resnet50 or torchvision/resnet50, or a model of
            timm, such as timm/resnet50.
        weights: None for random weights; "imagenet" for the weights that torchvision or timm
            provides, downloaded into the library's cache; or a file with weights of the same
            network (.pth, .pt or .safetensors).
        in_channels: Channels of the images. If it is not 3, the weights of the first convolution
            are summed over RGB or padded with zeros, see `widen_first_convolution`.
        grey: Whether the first channel is a grey image rather than red.
        stride: Largest stride of the output; later steps get stride 1. This shrinks the receptive
            field, so it is meant for small images and training from scratch.
        dilate: Whether to preserve the receptive field by dilating the convolutions after a removed
            stride, as pretrained weights require. Trunks of timm are always dilated.
        width: Fraction of the channels of every convolution, for random weights only; not for timm.
        until: Path of the last step to use, such as "layer2"; all steps by default.

    Raises:
        UserError: The name is unknown, the weights cannot be downloaded or do not fit, or the
            network cannot have the stride.
    """
    if width != 1.0 and weights is not None:
        raise UserError(f"{name}: weights are for the full width; leave out width {width:g}")
    if name.startswith(TIMM):
        if width != 1.0:
            raise UserError(
                f"{name}: width is for torchvision's trunks only; choose a narrower model of timm"
            )
        return build_timm_trunk(
            name, weights=weights, in_channels=in_channels, grey=grey, stride=stride, until=until
        )
    name = name.removeprefix("torchvision/")
    classifier = _classifier(name)
    if width != 1.0:
        slim(classifier, width, what=name)
    trunk = TorchvisionTrunk(name, classifier)
    if weights is not None:
        load_trunk_weights(trunk, weights, name, what=name)
    if in_channels != 3:
        widen_first_convolution(trunk, in_channels, pretrained=weights is not None, grey=grey)
    if stride is not None:
        keep_stride(trunk, stride, dilate=dilate)
    if until is not None:
        trunk.cut(until)
    return trunk


def _classifier(name: str) -> nn.Module:
    look_up(dict.fromkeys(models.list_models(module=models)), name, what="torchvision classifier")
    if name.startswith("maxvit"):
        raise UserError(f"{name} works at one input size only and cannot serve as a trunk")
    options: dict[str, object] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    classifier: nn.Module = models.get_model(name, **options)
    return classifier


def _fit_positions(positions: Tensor, grid: torch.Size) -> Tensor:
    """Resize position embeddings to a grid of h x w patches.

    Args:
        positions: (1, 1 + side**2, D), with the embedding of the class token first.
        grid: h, w.

    Returns:
        (1, 1 + h * w, D).
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if tuple(grid) == (side, side):
        return positions
    square = positions[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    resized = F.interpolate(square, tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def keep_stride(trunk: TorchvisionTrunk, stride: int, *, dilate: bool) -> None:
    """Remove all strides after the trunk has reached `stride`, in place; see `build_trunk`.

    Raises:
        UserError: The trunk does not have this stride, or later steps reduce the map by layers
            whose stride cannot be removed.
    """
    if stride not in trunk.level_strides:
        known = ", ".join(map(str, trunk.level_strides))
        raise UserError(f"{trunk.name}: stride must be one of {known}, got {stride}")
    dilation, before = 1, 1
    for path, own in trunk.step_strides.items():
        if own > stride:
            _drop_pooling(trunk, path)
            if dilate:
                after = dilation * (own // max(before, stride))
                _dilate(trunk.get_submodule(path), dilation, after)
                dilation = after
        before = own
        for module in trunk.get_submodule(path).modules() if own > stride else ():
            shrinks = isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
            if not shrinks or module.stride in (1, (1, 1)):
                continue
            padded = isinstance(module, nn.Conv2d) and all(
                2 * pad == spread * (side - 1)
                for pad, spread, side in zip(
                    module.padding, module.dilation, module.kernel_size, strict=True
                )
                if isinstance(pad, int)
            )
            if not padded:
                raise UserError(
                    f"{trunk.name}: cannot keep stride {stride}, because {path} shrinks the map "
                    f"by a {type(module).__name__}; up-sample the input instead"
                )
            module.stride = (1, 1)  # type: ignore[assignment]
    trunk.measure()
    if trunk.stride != stride:
        raise UserError(f"{trunk.name}: cannot keep stride {stride}; up-sample the input instead")


def _dilate(step: nn.Module, dilation: int, last: int) -> None:
    """Dilate a step's convolutions by the product of the strides removed before them, in place.

    Args:
        step: The step to change.
        dilation: Product of the strides removed before the step.
        last: Product of the strides removed up to the step's end. No dilation exceeds it, because a
            stride that occurs in several parallel branches counts only once.
    """
    for module in step.modules():
        if not isinstance(module, nn.Conv2d) or max(module.kernel_size) == 1:
            continue
        sides, stride = module.kernel_size, max(module.stride)
        here = min(dilation, last // stride)
        module.dilation = (here, here)
        module.padding = (here * (sides[0] - 1) // 2, here * (sides[1] - 1) // 2)
        dilation = max(dilation, here * stride)


def _drop_pooling(trunk: TorchvisionTrunk, path: str) -> None:
    """Remove pooling layers with non-overlapping windows from a step, in place.

    Without them the grid is finer, but nothing else changes.
    """
    for inner, module in list(trunk.get_submodule(path).named_modules(prefix=path)):
        pools = isinstance(module, nn.MaxPool2d | nn.AvgPool2d)
        if pools and module.kernel_size == module.stride and module.padding in (0, (0, 0)):
            parent, _, child = inner.rpartition(".")
            setattr(trunk.get_submodule(parent), child, nn.Identity())


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Options of all networks on a trunk.

    Attributes:
        trunk: Name of the trunk: resnet50, mobilenet_v2, timm/convnext_tiny, ...
        weights: Weights of the trunk: "imagenet", a file, or null for random weights.
        width: Fraction of the trunk's channels, for random weights only.
        until: Path of the trunk's last step to use; "features.17" of mobilenet_v2 leaves out the
            widening to 1,280 channels, which only mobilenet_v2's classifier needs.
        file: Weights of the whole network: a run's folder or a file, see
            `kd.nn.weights.load_network`. `weights` is then ignored. For detectors this may also be
            a weight file of torchvision.
    """

    trunk: str = "resnet18"
    weights: str | None = None
    width: float = 1.0
    until: str | None = None
    file: str | None = None

    def build(self, *, stride: int | None = None, dilate: bool = False) -> Trunk:
        """Build the trunk with the given output stride, see `build_trunk`."""
        weights = self.weights if self.file is None else None
        return build_trunk(
            self.trunk, weights=weights, stride=stride, dilate=dilate, width=self.width,
            until=self.until,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FreezableOptions(NetworkOptions):
    """Options of networks on a trunk that may be frozen in part.

    Attributes:
        frozen: "all", or the path of the last step of the trunk to freeze; null freezes no step.
        batch_norm_frozen: Whether to freeze all batch norms of the trunk.
    """

    frozen: str | None = None
    batch_norm_frozen: bool = False

    def freeze(self, trunk: Trunk) -> None:
        """Freeze parts of the trunk as these options say, in place."""
        freeze(trunk, self.frozen, self.batch_norm_frozen)
