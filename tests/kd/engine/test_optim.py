"""Groups of parameters, rates over the steps, averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kd.engine.optim import make_optimizer, make_schedule, update_average
from kd.errors import UserError


def model() -> nn.Module:
    return nn.ModuleDict({"student": nn.ModuleDict({
        "trunk": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        "head": nn.Linear(4, 2),
    })})  # fmt: skip


def test_norms_and_biases_do_not_decay() -> None:
    groups = make_optimizer(model(), lr=0.1, weight_decay=0.5).param_groups
    for group in groups:
        assert group["lr"] == 0.1
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.5}


def test_the_longest_prefix_sets_the_rate_and_zero_freezes() -> None:
    net = model()
    scales = {"trunk": 0.1, "trunk.1": 0.0, "head": 2.0}
    optimizer = make_optimizer(net, lr=1.0, lr_scale=scales)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rate.get(id(parameter)) for name, parameter in net.named_parameters()}
    assert named == {
        "student.trunk.0.weight": 0.1, "student.trunk.0.bias": 0.1,
        "student.trunk.1.weight": None, "student.trunk.1.bias": None,
        "student.head.weight": 2.0, "student.head.bias": 2.0,
    }  # fmt: skip
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["student.trunk.1.weight", "student.trunk.1.bias"]


def test_an_unknown_prefix_lists_what_there_is() -> None:
    with pytest.raises(UserError, match=r"no parameter name starts with trunc; .* start with head"):
        make_optimizer(model(), lr_scale={"trunc": 0.1})


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_optimiser_steps(name: str) -> None:
    net = nn.Linear(2, 1)
    before = net.weight.detach().clone()
    optimizer = make_optimizer(net, name=name, lr=0.1)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.weight, before)


def rates(steps: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, steps, **options)  # type: ignore[arg-type]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_by_hand() -> None:
    assert rates(4, name="constant") == [1, 1, 1, 1]
    assert rates(4, name="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(4, name="linear", final=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert rates(4, name="poly", power=2.0) == pytest.approx([1, 0.5625, 0.25, 0.0625])
    half_wave = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    assert rates(4) == pytest.approx(half_wave)
    assert rates(8, name="linear", warmup=0.25) == pytest.approx(
        [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_a_schedule_is_a_function_of_the_step() -> None:
    def state_after(steps: int) -> dict[str, object]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make_schedule(optimizer, 10, warmup=0.2)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return schedule.state_dict()

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, 10, warmup=0.2)
    schedule.load_state_dict(state_after(5))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates(10, warmup=0.2)[6])


def test_an_average_by_hand() -> None:
    average, net = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        net.weight.fill_(3.0)
        assert net.running_mean is not None and net.num_batches_tracked is not None
        net.running_mean.fill_(10.0)
        net.num_batches_tracked.fill_(7)
    update_average(average, net, 0.9, step=0)  # early: a tenth of the old
    assert average.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 3)
    update_average(average, net, 0.9, step=10_000)
    assert average.weight.item() == pytest.approx(0.9 * 2.8 + 0.1 * 3)
    assert average.running_mean is not None and average.num_batches_tracked is not None
    assert average.running_mean.item() == pytest.approx(0.9 * 9 + 0.1 * 10)
    assert average.num_batches_tracked.item() == 7
