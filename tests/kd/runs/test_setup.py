"""Batch norms over processes, precision, and what a training starts with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd.config.recipes import Train
from kd.distillation.student import AdaptedStudent
from kd.nn.freeze import freeze_batch_norm
from kd.runs.build import make_accelerator, native_bf16
from kd.runs.setup import count_parameters, start_training, sync_batch_norms


def test_shared_batch_norms_leave_frozen_ones_frozen() -> None:
    frozen = nn.Sequential(nn.BatchNorm2d(3))
    freeze_batch_norm(frozen)
    model = nn.Sequential(frozen, nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm1d(3)))
    model = sync_batch_norms(model)  # type: ignore[assignment]
    kinds = [type(m).__name__ for m in model.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == ["FrozenBatchNorm", "SyncBatchNorm", "SyncBatchNorm"]
    model.train()
    assert not frozen[0].training


def test_two_precisions_can_follow_each_other_in_one_process() -> None:
    for precision, mixed in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert make_accelerator(precision).mixed_precision == mixed
    assert isinstance(native_bf16(torch.device("cpu")), bool)


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_average_starts_as_a_frozen_copy(channels_last: bool) -> None:
    model = AdaptedStudent(nn.Conv2d(3, 4, 3))
    train = Train(ema=0.9, channels_last=channels_last)
    training = start_training(make_accelerator("fp32"), model, train, 5)
    assert training.ema is not None and training.ema is not training.unwrapped
    for mine, its in zip(training.ema.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert not mine.requires_grad and its.requires_grad
        format = torch.channels_last if channels_last else torch.contiguous_format
        if mine.ndim == 4:
            assert mine.is_contiguous(memory_format=format)
            assert its.is_contiguous(memory_format=format)
    assert count_parameters(model) == 3 * 4 * 9 + 4
    assert training.rate == pytest.approx(1e-3)
