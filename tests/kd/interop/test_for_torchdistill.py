"""Our losses under torchdistill's engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import get_mid_level_loss

import kd.interop.for_torchdistill  # noqa: F401
from kd.errors import ConfigError, UserError
from kd.losses import anchor_grid, imitation, imitation_mask, kl_logits, pair_wise

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "torchdistill.yaml"


class Small(nn.Module):
    """Named as torchvision's residual networks name their parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU())
        self.fc = nn.Linear(width, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.layer3(images).mean(dim=(2, 3)))
        return logits


def models() -> tuple[Small, Small]:
    torch.manual_seed(0)
    return Small(8), Small(4)


def test_the_example_config_trains_as_the_same_losses_by_hand() -> None:
    config = load_yaml_file(str(EXAMPLE))
    import_dependencies(config["dependencies"])
    images, labels = torch.randn(8, 3, 9, 9), torch.randint(5, (8,))
    teacher, student = models()
    box = DistillationBox(
        teacher, student, {"train": TensorDataset(images, labels)}, config["train"],
        torch.device("cpu"), None, False, 1,
    )  # fmt: skip
    losses = []
    for epoch in range(2):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, more in box.train_data_loader:
            loss = box.forward_process(batch, targets, more)
            box.post_forward_process(loss=loss)
            losses.append(loss.item())
    big, small = models()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9)
    expected = []
    for _ in range(2):
        for part in (slice(0, 4), slice(4, 8)):
            with torch.no_grad():
                theirs = big(images[part]), big.layer3(images[part])
            ours = small(images[part])
            loss = (
                F.cross_entropy(ours, labels[part])
                + kl_logits(ours, theirs[0])
                + 0.5 * pair_wise(small.layer3(images[part]), theirs[1], kernel=1)
            )
            expected.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] != losses[1]


def test_imitation_finds_its_places_from_the_boxes() -> None:
    loss = get_mid_level_loss(
        {
            "key": "kd.imitation",
            "kwargs": {
                "student_module_path": "adapter", "teacher_module_path": "layer4",
                "scales": [2.0], "ratios": [1.0], "psi": 0.4,
            },
        }
    )  # fmt: skip
    ours, theirs = torch.randn(2, 2, 3, 4, 5).unbind()
    targets = [{"boxes": torch.tensor([[10.0, 8.0, 40.0, 36.0]])}, {"boxes": torch.zeros(0, 4)}]
    value = loss({"adapter": {"output": ours}}, {"layer4": {"output": theirs}}, targets)
    anchors = anchor_grid(4, 5, stride=16.0, sides=[(32.0, 32.0)])
    mask = imitation_mask([one["boxes"] for one in targets], anchors, psi=0.4)
    assert mask.any() and torch.equal(value, imitation(ours, theirs, mask))
    with pytest.raises(UserError, match="targets must be a list"):
        loss({"adapter": {"output": ours}}, {"layer4": {"output": theirs}}, torch.zeros(2))


def test_a_wrong_option_is_named_when_the_box_is_set_up() -> None:
    places = {"student_module_path": "fc", "teacher_module_path": "fc"}
    with pytest.raises(ConfigError, match=r"kd\.kl_logits: unknown option 'temprature'"):
        get_mid_level_loss({"key": "kd.kl_logits", "kwargs": {**places, "temprature": 2.0}})
