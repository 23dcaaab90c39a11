"""The loop: the same weights as one written by hand, whole-batch gradients, what stops it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.config.recipes import Optimizer, Schedule, TermSection, Train
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import build_term
from kd.engine.checkpoint import Progress
from kd.engine.loop import evaluate, fit, forward_losses, train_step
from kd.engine.state import Hooks, Objective, Training
from kd.errors import UserError
from kd.nn.freeze import FrozenBatchNorm, evaluating
from kd.problems.base import Batch, Rows, Task
from kd.problems.objects.task import Classification
from kd.runs.build import make_accelerator
from kd.runs.setup import start_training

CLASSES = 5
SIZE = 32
PLAIN_SGD = Train(
    optimizer=Optimizer(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0),
    schedule=Schedule(name="constant", warmup=0.0),
    clip_norm=0.0,
    channels_last=False,
    precision="fp32",
)


class SmallStudent(nn.Module):
    """A trunk and two heads without batch norm; the object is the mean of its image."""

    def __init__(self, *, dropout: float = 0.0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, stride=8, padding=1)
        self.norm = norm or nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.appearance = nn.Linear(10, CLASSES)
        self.context = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """Logits of both heads and their sum."""
        features = self.norm(self.trunk(images)).relu().mean(dim=(2, 3))[rois[:, 0].long()]
        seen = torch.cat([features, rois[:, 1:] / SIZE], dim=1)
        appearance = self.appearance(self.dropout(seen))
        context = self.context(features)
        return {"logits": appearance + context, "appearance": appearance, "context": context}


def make_batch(counts: list[int], *, seed: int = 0, withheld: int = 0) -> dict[str, Tensor]:
    """Images with so many objects each, all hidden; the labels of the last images withheld."""
    random = torch.Generator().manual_seed(seed)
    images, objects = len(counts), sum(counts)
    low = torch.rand(objects, 2, generator=random) * SIZE / 2
    boxes = torch.cat([low, low + 4 + torch.rand(objects, 2, generator=random) * 10], dim=1)
    image_of = torch.arange(images).repeat_interleave(torch.tensor(counts))
    labels = torch.randint(CLASSES, (objects,), generator=random)
    labels[image_of >= images - withheld] = -1
    return {
        "images": torch.randint(256, (images, 3, SIZE, SIZE), generator=random, dtype=torch.uint8),
        "sizes": torch.full((images, 2), SIZE),
        "image_ids": torch.arange(images) + 1,
        "boxes": boxes,
        "labels": labels,
        "image_of": image_of,
        "object_ids": torch.arange(objects) + 100 * seed,
        "area_fractions": torch.full((objects,), 0.1),
        "usable": torch.ones(objects, dtype=torch.bool),
        "hidden": torch.arange(objects),
        "hide_fraction": torch.ones(objects),
    }


def join(*batches: Batch) -> dict[str, Tensor]:
    """One batch of several, indices counting on."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for name, counted in (("image_of", "images"), ("hidden", "labels")):
        before, parts = 0, []
        for batch in batches:
            parts.append(batch[name] + before)
            before += len(batch[counted])
        whole[name] = torch.cat(parts)
    return whole


class Loader:
    """A list of batches as a loader, for any epoch the same ones."""

    def __init__(self, batches: list[dict[str, Tensor]], *, broken_at: int | None = None) -> None:
        self.batches, self.start, self.broken_at = batches, 0, broken_at

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(self.batches[self.start :], self.start):
            if number == self.broken_at:
                raise UserError("000.jpg: truncated")
            yield batch

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.start = start_batch


class Hearsay:
    """Soft targets and a feature map that follow from the objects' ids alone."""

    def __call__(self, batch: Batch, rows: Rows) -> dict[str, Tensor]:
        ids = batch["object_ids"][batch["hidden"]]
        log_probs = torch.stack([torch.sin(ids * (c + 1.0)) for c in range(CLASSES)], dim=1)
        maps = torch.stack([torch.cos(ids * (c + 2.0)) for c in range(6)], dim=1)
        grid = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
        return {"posterior": log_probs.log_softmax(dim=1), "map": maps[:, :, None, None] * grid}


TERMS = [
    build_term(TermSection(name="context_logits", weight=0.7, options={"temperature": 1.0})),
    build_term(TermSection(name="context_features", weight=0.3, student="trunk", teacher="map")),
    build_term(TermSection(name="pair_wise", weight=0.5, student="trunk", teacher="map")),
]


def objective(*, distilled: bool = False, task: Task | None = None) -> Objective:
    task = task or Classification(num_classes=CLASSES)
    weights = {"cross_entropy": 1.0}
    return Objective(task, weights, TERMS, Hearsay()) if distilled else Objective(task, weights)


def start(train: Train = PLAIN_SGD, steps: int = 10, **options: Any) -> Training:
    """A fresh training of a small student whose trunk is tapped; the seed is fixed."""
    torch.manual_seed(3)
    model = AdaptedStudent(SmallStudent(**options), ["trunk"])
    return start_training(make_accelerator("fp32"), model, train, steps)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def quiet(**replaced: Any) -> Hooks:
    return Hooks(**{"log": lambda values, step: None, "checkpoint": lambda: None, **replaced})


def test_fit_ends_in_the_weights_of_a_loop_written_by_hand() -> None:
    recipe = Train(
        optimizer=Optimizer(name="adamw", lr=1e-2, weight_decay=0.1),
        schedule=Schedule(name="cosine", warmup=0.2),
        clip_norm=0.5,
        ema=0.9,
        channels_last=False,
    )
    batches = [make_batch([2, 1, 3], seed=seed) for seed in range(4)]
    training = start(recipe, steps=8, dropout=0.2)
    student = copy.deepcopy(training.unwrapped.student)
    assert isinstance(student, SmallStudent)
    torch.manual_seed(7)
    fit(training, objective(), Loader(batches), epochs=2, hooks=quiet())

    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim == 1]
    groups = [
        {"params": others, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    average = copy.deepcopy(student)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    spread = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    torch.manual_seed(7)
    for step in range(8):
        batch = batches[step % 4]
        rise = (step + 1) / 3 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 6)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rise
        rois = torch.cat([batch["image_of"][:, None].float(), batch["boxes"]], dim=1)
        logits = student((batch["images"] - mean) / spread, rois)["logits"]
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for mine, its in zip(average.parameters(), student.parameters(), strict=True):
            mine.data.lerp_(its.data, 1 - decay)
    ours = training.unwrapped.student
    assert isinstance(ours, nn.Module)
    for (name, mine), its in zip(ours.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6, msg=name)
    averaged = training.exported
    assert averaged is not ours
    for mine, its in zip(averaged.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_add_up_to_the_whole_batch(parts: int) -> None:
    counts = [[1, 4], [2, 1, 3], [5]][:parts]
    small = [
        make_batch(count, seed=seed, withheld=seed % 2) for seed, count in enumerate(counts, 1)
    ]
    goal = objective(distilled=True)
    weights = goal.weights_at(0.0)
    one, many = start(), start()
    whole_sums, whole_counts = train_step(one, [join(*small)], goal, weights)
    sums, totals = train_step(many, small, goal, weights)
    for name, tensor in one.unwrapped.state_dict().items():
        torch.testing.assert_close(tensor, many.unwrapped.state_dict()[name], msg=name)
    for name in whole_sums:  # and so do the losses that are logged
        torch.testing.assert_close(
            sums[name] / totals[name], whole_sums[name] / whole_counts[name], msg=name
        )


def test_a_short_last_group_still_takes_its_step() -> None:
    training = start()
    batches = [make_batch([1, 2], seed=seed) for seed in range(5)]
    fit(training, objective(), Loader(batches), epochs=2, hooks=quiet(), accumulate=2)
    assert training.progress == Progress(epoch=2, batch=0, step=6)


def test_unlabelled_images_move_the_distillation_terms_alone() -> None:
    labelled = make_batch([2, 3], seed=1)
    unlabelled = make_batch([1, 4], seed=2, withheld=2)
    model = start().unwrapped
    goal = objective(distilled=True)
    alone = forward_losses(model, labelled, goal)
    both = forward_losses(model, join(labelled, unlabelled), goal)
    torch.testing.assert_close(alone["cross_entropy"].value, both["cross_entropy"].value)
    for term in TERMS:
        assert not torch.isclose(alone[term.name].value, both[term.name].value)
    plain = [start(), start()]
    for training, batch in zip(plain, (labelled, join(labelled, unlabelled)), strict=True):
        train_step(training, [batch], objective(), {"cross_entropy": 1.0})
    for name, tensor in plain[0].unwrapped.state_dict().items():
        torch.testing.assert_close(tensor, plain[1].unwrapped.state_dict()[name], msg=name)


def test_a_batch_without_labels_leaves_the_supervised_weights_alone() -> None:
    training = start()
    before = state(training.unwrapped)
    batch = make_batch([1, 2], withheld=2)
    sums, counts = train_step(training, [batch], objective(), {"cross_entropy": 1.0})
    assert_equal(before, state(training.unwrapped))
    assert sums["cross_entropy"] == 0
    assert counts["cross_entropy"] == 0


def test_terms_at_weight_zero_change_no_bit() -> None:
    sections = [term.section.model_copy(update={"weight": 0.0}) for term in TERMS]
    off = [build_term(section) for section in sections]
    goal = objective(distilled=True)
    batches = [make_batch([2, 1, 3], seed=seed, withheld=1) for seed in range(3)]
    recipe = PLAIN_SGD.model_copy(update={"clip_norm": 1.0})
    distilled, plain = start(recipe, dropout=0.3), start(recipe, dropout=0.3)
    for training, aim in (
        (distilled, dataclasses.replace(goal, terms=off)),
        (plain, objective()),
    ):
        torch.manual_seed(5)
        fit(training, aim, Loader(batches), epochs=2, hooks=quiet())
    assert_equal(state(distilled.unwrapped), state(plain.unwrapped))


def test_the_average_follows_statistics_and_copies_counters() -> None:
    recipe = PLAIN_SGD.model_copy(update={"ema": 0.5})
    training = start(recipe, norm=nn.BatchNorm2d(6))
    assert training.ema is not None
    first = state(training.ema)
    fit(training, objective(), Loader([make_batch([1, 2])] * 3), epochs=1, hooks=quiet())
    own, averaged = state(training.unwrapped), state(training.ema)
    assert averaged["student.norm.num_batches_tracked"] == 3
    expected = first["student.norm.running_mean"]
    assert not torch.equal(averaged["student.norm.running_mean"], expected)
    assert not torch.equal(averaged["student.norm.running_mean"], own["student.norm.running_mean"])
    assert not any(module.training for module in training.ema.modules())
    assert training.exported is training.ema.student


def test_the_base_rate_is_logged_whatever_the_groups_have() -> None:
    section = Optimizer(name="sgd", lr=0.1, lr_scale={"trunk": 5.0, "context": 0.1})
    recipe = Train(optimizer=section, schedule=Schedule(name="linear", warmup=0.0))
    training = start(recipe, steps=4)
    seen: list[tuple[int, float]] = []
    hooks = quiet(log=lambda values, step: seen.append((step, values.get("train/lr", -1.0))))
    batches = [make_batch([1, 2])] * 4
    fit(training, objective(), Loader(batches), epochs=1, hooks=hooks, log_every=1)
    rates = [rate for _, rate in seen if rate >= 0]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_loss_with_nothing_to_compare_in_a_whole_epoch_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unlabelled, labelled = make_batch([2, 1], withheld=2), make_batch([1, 2])
    fit(start(), objective(), Loader([unlabelled] * 2), epochs=2, hooks=quiet(), log_every=1)
    warned = [record.message for record in caplog.records]
    assert [text.split(":")[0] for text in warned] == ["epoch 1", "epoch 2"]
    assert all("cross_entropy had no effect" in text for text in warned)
    caplog.clear()
    fit(start(), objective(), Loader([unlabelled, labelled]), epochs=1, hooks=quiet(), log_every=1)
    assert not caplog.records


def test_logged_losses_are_means_over_all_objects_since_the_last_line() -> None:
    batches = [make_batch([1], seed=1), make_batch([4, 3], seed=2)]
    frozen = Train(optimizer=Optimizer(name="sgd", lr=1e-12), channels_last=False)
    training = start(frozen)
    lines: list[dict[str, float]] = []
    hooks = quiet(log=lambda values, step: lines.append(values))
    fit(training, objective(), Loader(batches), epochs=1, hooks=hooks)
    model = training.unwrapped
    whole = forward_losses(model, join(*batches), objective())["cross_entropy"].value.item()
    means = [forward_losses(model, b, objective())["cross_entropy"].value.item() for b in batches]
    assert lines[0]["loss/cross_entropy"] == pytest.approx(whole, rel=1e-4)
    assert lines[0]["loss/total"] == pytest.approx(sum(means) / 2, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint() -> None:
    saved: list[int] = []
    training = start(PLAIN_SGD.model_copy(update={"optimizer": Optimizer(name="sgd", lr=1e30)}))
    hooks = quiet(checkpoint=lambda: saved.append(training.progress.step))
    batches = [make_batch([2, 2], seed=seed) for seed in range(6)]
    with pytest.raises(
        UserError, match=r"loss cross_entropy.* not finite at step 6.*last checkpoint"
    ):
        fit(training, objective(), Loader(batches), epochs=2, hooks=hooks, log_every=100)
    assert saved == []


def test_a_broken_image_ends_training_after_a_checkpoint() -> None:
    saved: list[Progress] = []
    training = start()
    hooks = quiet(checkpoint=lambda: saved.append(copy.copy(training.progress)))
    loader = Loader([make_batch([1, 2])] * 4, broken_at=3)
    with pytest.raises(UserError, match="truncated"):
        fit(training, objective(), loader, epochs=1, hooks=hooks)
    assert saved == [Progress(epoch=0, batch=3, step=3)]


def test_who_asks_to_stop_gets_a_checkpoint_after_the_step() -> None:
    saved: list[Progress] = []
    training = start()
    hooks = quiet(
        checkpoint=lambda: saved.append(copy.copy(training.progress)),
        stop=lambda: training.progress.step == 2,
    )
    with pytest.raises(KeyboardInterrupt):
        fit(training, objective(), Loader([make_batch([1, 2])] * 4), epochs=1, hooks=hooks)
    assert saved == [Progress(epoch=0, batch=2, step=2)]


def test_a_stop_after_a_broken_step_does_not_overwrite_the_checkpoint() -> None:
    saved: list[int] = []
    training = start(PLAIN_SGD.model_copy(update={"optimizer": Optimizer(name="sgd", lr=1e30)}))
    hooks = quiet(
        checkpoint=lambda: saved.append(training.progress.step),
        stop=lambda: training.progress.step == 5,
    )
    with pytest.raises(UserError, match="not finite"):
        fit(training, objective(), Loader([make_batch([2, 2])] * 6), epochs=1, hooks=hooks)
    assert saved == []


def test_checkpoints_come_at_their_steps_and_at_each_epochs_end() -> None:
    saved: list[tuple[int, int, int]] = []
    training = start()
    hooks = quiet(checkpoint=lambda: saved.append(dataclasses.astuple(training.progress)))
    loader = Loader([make_batch([1, 2])] * 4)
    fit(training, objective(), loader, epochs=2, hooks=hooks, checkpoint_every=2)
    assert saved == [(0, 2, 2), (1, 0, 4), (1, 2, 6), (2, 0, 8)]


class Collected:
    """A metric that keeps what it is given."""

    def __init__(self) -> None:
        self.log_probs: list[Tensor] = []
        self.gathered = False

    def take(self, decoded: Tensor, batch: Batch) -> None:
        assert len(decoded) == len(batch["hidden"])
        self.log_probs.append(decoded)

    def gather(self) -> None:
        self.gathered = True


def test_evaluation_gives_every_part_of_the_model_its_own_mode_back() -> None:
    model = AdaptedStudent(SmallStudent(dropout=0.5, norm=FrozenBatchNorm(6)))
    model.train()
    student = model.student
    assert isinstance(student, SmallStudent)
    student.appearance.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    metric = Collected()
    batch = make_batch([1, 2])
    args = (Classification(num_classes=CLASSES), Loader([batch]), metric, make_accelerator("fp32"))
    evaluate(model, *args)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes["student.norm"] is False
    evaluate(model, *args)
    assert torch.equal(metric.log_probs[0], metric.log_probs[1])  # no dropout
    assert metric.gathered
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_evaluation_draws_no_random_number() -> None:
    model = AdaptedStudent(SmallStudent(dropout=0.5))
    before = torch.get_rng_state()
    task = Classification(num_classes=CLASSES)
    evaluate(model, task, Loader([make_batch([1, 2])]), Collected(), make_accelerator("fp32"))
    assert torch.equal(before, torch.get_rng_state())
