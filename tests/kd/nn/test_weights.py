"""A model's hash is that of its weights."""

from __future__ import annotations

import torch
from torch import nn

from kd.nn.weights import weights_hash


def test_the_hash_follows_weights_and_buffers() -> None:
    linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    model = nn.Sequential(linear, norm)
    first = weights_hash(model)
    assert weights_hash(model) == first
    with torch.no_grad():
        linear.weight[0, 0] += 1
    second = weights_hash(model)
    assert second != first
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    assert weights_hash(model) not in (first, second)


def test_the_hash_follows_names_shapes_and_kind() -> None:
    model = nn.Linear(2, 3, bias=False)
    turned = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        turned.weight.copy_(model.weight.reshape(2, 3))
    hashes = {weights_hash(model), weights_hash(turned), weights_hash(nn.Sequential(model))}
    assert len(hashes | {weights_hash(model, "stride 16")}) == 4
