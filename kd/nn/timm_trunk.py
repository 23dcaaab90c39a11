"""Any model of timm as a feature trunk.

timm is imported only when a trunk is built. The code of timm is under Apache-2.0. Each file of
weights has a separate licence, named in `pretrained_cfg`; some are for non-commercial use only.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.freeze import evaluating
from kd.nn.trunk_base import Trunk
from kd.nn.weights import load_timm_weights, widen_first_convolution
from kd.registry import suggestion
from kd.transforms.hide import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)

PREFIX = "timm/"
# Options of timm that make a transformer accept images of any size. Each family of transformers
# supports at most one of them.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})
_ODD = (97, 129)  # height and width of the image that tests whether a network accepts any size


class TimmTrunk(Trunk):
    """A trunk on timm's feature extractor, `timm.create_model(..., features_only=True)`.

    Input images are normalised by ImageNet's mean and standard deviation. They are renormalised
    here if the model was trained with another mean or standard deviation. If a network accepts only
    multiples of its stride, images are padded at the right and at the bottom with the mean colour.

    Args:
        name: Name of the trunk in error messages.
        network: The feature extractor.
        build: Function that builds the same extractor with other `out_indices`.
    """

    def __init__(self, name: str, network: nn.Module, build: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.name, self.network, self._build = name, network, build
        about: dict[str, Any] = dict(vars(network).get("pretrained_cfg") or {})
        mean, std = about.get("mean", IMAGENET_MEAN), about.get("std", IMAGENET_STD)
        self._scale = [ours / theirs for ours, theirs in zip(IMAGENET_STD, std, strict=True)]
        self._shift = [(a - b) / s for a, b, s in zip(IMAGENET_MEAN, mean, std, strict=True)]
        self._rescaled = tuple(mean) != IMAGENET_MEAN or tuple(std) != IMAGENET_STD
        self._read_shapes()

    def _read_shapes(self) -> None:
        """Read channels, strides and steps from the network's `feature_info`."""
        about: Any = self.network.feature_info
        self._channels = tuple(about.channels())
        self._strides = tuple(about.reduction())
        steps = [path for path, _ in self.steps()]
        self._paths = tuple(_step_of(name, steps) for name in about.module_name())
        last = {stride: place for place, stride in enumerate(self._strides)}
        self._last = {stride: last[stride] for stride in sorted(last) if stride > 1}
        self.level_strides = tuple(self._last)
        self.level_channels = tuple(self._channels[place] for place in self._last.values())
        self.channels, self.stride = self._channels[-1], self._strides[-1]
        self._multiple = 1  # while it is measured
        self._multiple = self._measure_multiple()

    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        path, network = "network", self.network
        if isinstance(getattr(network, "model", None), nn.Module):  # timm wraps transformers
            path, network = "network.model", network.get_submodule("model")
        for name, child in network.named_children():
            if name in ("blocks", "stages") and isinstance(child, nn.Sequential | nn.ModuleList):
                for number, inner in child.named_children():
                    yield f"{path}.{name}.{number}", inner
            else:
                yield f"{path}.{name}", child

    def forward_levels(self, images: Tensor) -> list[Tensor]:
        maps = self._maps(images)
        return [maps[place] for place in self._last.values()]

    def forward_at(self, images: Tensor, paths: Sequence[str]) -> list[Tensor]:
        maps = self._maps(images)
        return [maps[self._paths.index(path)] for path in paths]

    def stages(self) -> list[tuple[str, int]]:
        """Return path and channels of each feature map, finest first.

        For networks whose maps all have one stride, such as plain transformers, only the last map
        is returned.
        """
        if len(set(self._strides)) == 1:
            return [(self._paths[-1], self.channels)]
        return list(zip(self._paths, self._channels, strict=True))

    def last_step(self, stride: int) -> str:
        return self._paths[self._last[stride]]

    def cut(self, until: str) -> None:
        """Remove all steps after the step with the path `until`, which must be one of `stages`."""
        paths = [path for path, _ in self.stages()]
        if until not in paths:
            raise UserError(f"{self.name} has no step {until!r}{suggestion(until, paths)}")
        if until == paths[-1]:
            return
        state = self.network.state_dict()
        smaller = self._build(out_indices=tuple(range(paths.index(until) + 1)))
        smaller.load_state_dict({name: state[name] for name in smaller.state_dict()})
        self.network = smaller.train(self.training)
        self._read_shapes()

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Compute all feature maps of the extractor, (N, C, h, w) each."""
        if self._rescaled and images.shape[1] == 3:
            scale, shift = images.new_tensor(self._scale), images.new_tensor(self._shift)
            images = images * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)
        if self._multiple > 1:
            height, width = images.shape[2:]
            images = F.pad(images, (0, -width % self._multiple, 0, -height % self._multiple))
        maps: list[Tensor] = self.network(images)
        last = getattr(self.network, "output_fmt", None)
        if last is not None and str(getattr(last, "value", last)) == "NHWC":
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return maps

    def _measure_multiple(self) -> int:
        """Find which image sizes the network accepts, by trying.

        Returns:
            1 if it accepts any size, or the stride if it accepts multiples of the stride only.
        """
        first = next(m for m in self.modules() if isinstance(m, nn.Conv2d))
        images = first.weight.new_zeros(1, first.in_channels, *_ODD)
        for multiple in (1, self.level_strides[-1]):
            below, right = (-side % multiple for side in _ODD)
            try:
                with torch.no_grad(), evaluating(self):
                    self._maps(F.pad(images, (0, right, 0, below)))
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = str(error)
            else:
                return multiple
        raise UserError(
            f"{self.name} works at one input size only and cannot be a trunk ({reason})"
        )


def build_timm_trunk(
    name: str,
    *,
    weights: str | None = None,
    in_channels: int = 3,
    grey: bool = False,
    stride: int | None = None,
    until: str | None = None,
) -> TimmTrunk:
    """Build the trunk "timm/NAME"; for arguments and errors see `kd.nn.trunk.build_trunk`."""
    import timm  # not at the top, because importing timm takes seconds

    model = name.removeprefix(PREFIX)
    try:
        known = timm.is_model(model)
    except (RuntimeError, ValueError):
        known = False
    if not known:
        raise UserError(f"unknown timm model {model!r}{suggestion(model, timm.list_models())}")
    pretrained = weights == "imagenet"
    channels = 3 if weights is not None else in_channels
    build = functools.partial(_create, model, in_chans=channels, output_stride=stride)
    try:
        network = build(pretrained=pretrained)
    except Exception as error:  # because timm raises errors of many classes
        raise UserError(_refusal(name, error, pretrained=pretrained, stride=stride)) from error
    trunk = TimmTrunk(name, network, build)
    if pretrained:
        about = network.pretrained_cfg
        log.info("%s: weights %s, licence %s", name, about.get("tag"), about.get("license"))
    if stride is not None and trunk.stride != stride:
        raise UserError(f"{name}: cannot keep stride {stride}; up-sample the input instead")
    if weights is not None and not pretrained:
        load_timm_weights(trunk, weights, what=name)
    if channels != in_channels:
        widen_first_convolution(trunk, in_channels, pretrained=True, grey=grey)
    if until is not None:
        trunk.cut(until)
    return trunk


def _create(model: str, *, pretrained: bool = False, **options: Any) -> Any:
    """Create timm's feature extractor.

    For plain transformers the only map is that of the last tokens after the final norm.
    """
    import timm

    options = {key: value for key, value in options.items() if value is not None}
    network: Any
    for flags in (*_ANY_SIZE, {}):
        arguments: dict[str, Any] = {"pretrained": pretrained, **options, **flags}
        try:
            network = timm.create_model(model, features_only=True, **arguments)
            break
        except TypeError:
            if not flags:
                raise
    getter: Any = type(network)
    if getter.__name__ == "FeatureGetterNet" and len(set(network.feature_info.reduction())) == 1:
        about = network.pretrained_cfg
        network = getter(timm.create_model(model, **arguments), out_indices=1, norm=True)
        network.pretrained_cfg = about
    return network


def _refusal(name: str, error: Exception, *, pretrained: bool, stride: int | None) -> str:
    """Write our error message for an error that timm raised while building the network."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if pretrained and not isinstance(error, TypeError | AssertionError):
        return (
            f"weights: imagenet: timm's weights of {name} cannot be downloaded ({reason}). Without "
            "a connection set weights: FILE, to use a file with these weights, or weights: null, "
            "to start from random weights"
        )
    if stride is not None:
        return f"{name}: cannot keep stride {stride} ({reason}); up-sample the input instead"
    return f"{name} cannot serve as a trunk: {reason}"


def _step_of(feature: str, steps: Sequence[str]) -> str:
    """Return the path of the step that computes timm's feature map called `feature`."""

    def folded(path: str) -> str:
        path = path.removeprefix("network.").removeprefix("model.")
        return f"{path.replace('.', '_')}_"

    fitting = [path for path in steps if folded(feature).startswith(folded(path))]
    return max(fitting, key=len) if fitting else f"network.{feature}"
