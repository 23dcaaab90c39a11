"""MSI-Net, which predicts saliency from the last three stages of a VGG and an atrous pyramid."""

from __future__ import annotations

from torch import Tensor, nn

from kd.errors import UserError, at_least
from kd.nn.multi_stride_trunk import JoinedStages
from kd.nn.saliency import ContextPyramid, LogitMap, PlainDecoder, padded
from kd.nn.trunk import build_trunk
from kd.nn.weights import load_network

STRIDES = (8, 16)


class MSINet(nn.Module):
    """A saliency network of three trunk stages, an atrous pyramid on their maps, and a decoder.

    Attributes:
        task: Name of the task that fits the output.
        stride: Pixels per cell of the pyramid's map; images are padded to multiples of this stride.
    """

    task = "saliency"

    def __init__(self, stages: JoinedStages, *, head: int) -> None:
        super().__init__()
        self.trunk, self.stride = stages, stages.stride
        self.pyramid = ContextPyramid(stages.channels, head)
        self.decoder = PlainDecoder(head)
        self.saliency = LogitMap(self.decoder.channels)
        for part in (self.pyramid, self.decoder, self.saliency):
            for module in part.modules():
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    # As published. With smaller initial weights the maps would vanish, because
                    # there are no norms.
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map normalised images (N, 3, H, W) of any size to logits `saliency` (N, 1, H, W)."""
        whole = padded(images, self.stride)
        maps = self.decoder(self.pyramid(self.trunk(whole)))  # (N, head / 8, 8 H/stride, ...)
        logits = self.saliency(maps, whole=whole.shape[2:], size=images.shape[2:])
        return {"saliency": logits}


def msinet(
    *,
    trunk: str = "vgg16",
    weights: str | None = None,
    stride: int = 8,
    until: str | None = None,
    head: int = 256,
    file: str | None = None,
) -> MSINet:
    """Build MSI-Net (Kroner et al., 2020, https://arxiv.org/abs/1902.06634), 24.93 M parameters.

    The default is the published network. In VGG-16 the last two poolings have stride 1, and the
    last three convolutions are dilated by 2. The maps of the last three stages are concatenated to
    1,280 channels at 1/8 of the image's size. An atrous pyramid with dilations 4, 8 and 12 follows,
    and then three steps of up-sampling by 2 and convolution. The authors rescale the output to 0..1
    by its minimum and maximum; here the output is logits.

    Args:
        trunk: Name of the trunk: vgg16, timm/NAME, ...
        weights: Weights of the trunk: "imagenet", a file, or null for random weights.
        stride: Pixels per cell of the pyramid's map, 8 or 16. With 16 the decoder ends at half the
            image's size and costs a quarter.
        until: Path of the trunk's last step to use; "features.17" of mobilenet_v2 leaves out the
            widening to 1,280 channels, which only mobilenet_v2's classifier needs.
        head: Channels of the pyramid's map. The steps of the decoder have a half, a quarter and an
            eighth of them.
        file: File with weights of the whole network, see `kd.nn.weights.load_network`. `weights` is
            then ignored.

    Raises:
        UserError: An option is out of range, the trunk cannot be built, or the file does not fit
            the network.
    """
    if stride not in STRIDES:
        raise UserError(f"msinet: stride must be 8 or 16, got {stride}")
    at_least("msinet", head=(head, 8))
    weights = weights if file is None else None
    features = build_trunk(trunk, weights=weights, stride=stride, dilate=True, until=until)
    network = MSINet(JoinedStages(features), head=head)
    load_network(network, file, what=f"msinet on {trunk}")
    return network
