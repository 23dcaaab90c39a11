"""The critic's own step: after the student's, on detached maps, resumed exactly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd.config.recipes import Critic, Optimizer, Schedule, TermSection, Train
from kd.distillation.student import AdaptedStudent
from kd.distillation.terms import Term, build_term, draw_modules, modules_of
from kd.engine.loop import fit, train_step
from kd.engine.state import Hooks, Objective, Training, resume_training, save_training
from kd.errors import UserError
from kd.losses.holistic import Adversary, critic_loss, holistic
from kd.problems.base import Batch, Classes, Evaluator, Mean, Output, Rows, Task
from kd.runs.build import make_accelerator
from kd.runs.setup import start_training

CLASSES, SIZE = 3, 32
PLAIN = Schedule(name="constant", warmup=0.0)
RECIPE = Train(
    optimizer=Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0),
    schedule=PLAIN,
    critic=Critic(optimizer=Optimizer(name="adam", lr=1e-3, momentum=0.0, weight_decay=0.0)),
    clip_norm=0.0,
    channels_last=False,
    precision="fp32",
)


class Painting(Task):
    """Every image is one row; the supervised loss makes scores small."""

    outputs = ("scores",)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return (batch["images"].float() / 255,)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        return {"size": Mean(output["scores"].square().mean(), "images")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        return output["scores"].mean(dim=(2, 3)).log_softmax(dim=1)

    def metric(self, classes: Classes) -> Evaluator:
        """Nothing is evaluated here."""
        raise NotImplementedError


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paint = nn.Conv2d(3, CLASSES, 3, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"scores": self.paint(images)}


def bright(batch: Batch, rows: Rows | None = None) -> dict[str, Tensor]:
    """The teacher: scores that follow from the colours."""
    return {"logits": batch["images"].float() / 64}


def make_batch(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, SIZE, SIZE), generator=random, dtype=torch.uint8)
    rows = torch.arange(count)
    return {"images": images, "labels": rows % CLASSES}


class Loader:
    def __init__(self, batches: int, broken: float | None = None) -> None:
        self.batches, self.start = batches, 0

    def __iter__(self) -> Any:
        return iter([make_batch(seed=seed) for seed in range(self.start, self.batches)])

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.start = start_batch


def start(
    train: Train = RECIPE, steps: int = 10, more: Sequence[Term] = (), **options: Any
) -> tuple[Training, Objective]:
    torch.manual_seed(1)
    options = {"widths": [4, 8], **options}
    term = build_term(TermSection(name="holistic", weight=0.5, student="scores", options=options))
    model = AdaptedStudent(Painter())
    terms = draw_modules([term, *more], bright(make_batch()))
    critics = modules_of(terms, trained="critic")
    training = start_training(make_accelerator("fp32"), model, train, steps, critics)
    return training, Objective(Painting(), {"size": 1.0}, terms, bright)


def adversary(objective: Objective) -> Adversary:
    function = objective.terms[0].function
    assert isinstance(function, Adversary)
    return function


def test_student_and_critic_take_the_steps_of_a_loop_written_by_hand() -> None:
    training, objective = start()
    student = copy.deepcopy(training.unwrapped.student)
    assert isinstance(student, nn.Module)
    mine = copy.deepcopy(adversary(objective))
    sgd = torch.optim.SGD(student.parameters(), lr=0.1)
    adam = torch.optim.Adam(mine.parameters(), lr=1e-3, betas=(0.0, 0.999))
    training.model.train()
    batches = [make_batch(seed=seed) for seed in range(3)]
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        train_step(training, [batch], objective, objective.weights_at(0.0))
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        scores = student(batch["images"].float() / 255)["scores"]
        (seen,) = Painting().inputs(batch)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        images = (seen - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        mine.eval()
        (scores.square().mean() + 0.5 * holistic(scores, images, mine.critic)).backward()
        sgd.step()
        adam.zero_grad()  # what the student's loss left on the critic is not the critic's to use
        mine.train()
        critic_loss(mine.critic, scores, bright(batch)["logits"], images).backward()
        adam.step()
        sgd.zero_grad(), adam.zero_grad()
        for group in adam.param_groups:  # poly
            group["lr"] = 1e-3 * (1 - (seed + 1) / 10) ** 0.9
    ours = dict(training.unwrapped.student.state_dict())  # type: ignore[union-attr]
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, msg=name)
    learned = adversary(objective).state_dict()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(learned[name], tensor, msg=name)


def test_neither_step_leaves_a_gradient_on_the_other_side() -> None:
    training, objective = start()
    critic = adversary(objective)
    before = copy.deepcopy(critic.state_dict())
    training.model.train()
    training.critics = ()
    train_step(training, [make_batch()], objective, objective.weights_at(0.0))
    assert all(parameter.grad is None for parameter in critic.parameters())
    after = critic.state_dict()  # power iteration included
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_critic_resumes_to_the_same_bits(tmp_path: Path) -> None:
    file, logged = tmp_path / "last.pt", []

    def run(training: Training, objective: Objective, stop_at: int) -> None:
        hooks = Hooks(
            log=lambda values, step: logged.append(values),
            checkpoint=lambda: save_training(training, file, {}),
            stop=lambda: training.progress.step == stop_at,
        )
        fit(training, objective, Loader(5), epochs=2, hooks=hooks, log_every=1)

    whole, goal = start()
    torch.manual_seed(7)
    run(whole, goal, 0)
    first, half = start()
    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        run(first, half, 3)
    second, rest = start()
    torch.manual_seed(99)
    resume_training(second, file)
    run(second, rest, 0)
    for (name, one), two in zip(
        adversary(goal).state_dict().items(), adversary(rest).state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    for (name, one), two in zip(
        whole.unwrapped.state_dict().items(), second.unwrapped.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    assert "loss/holistic_critic" in logged[0] and "loss/holistic" in logged[0]


def test_micro_batches_give_the_critic_the_whole_batchs_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    descent = Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)  # sees the scale
    train = RECIPE.model_copy(update={"critic": Critic(optimizer=descent, schedule=PLAIN)})
    for parts in (1, 2):
        # The points of the penalty are drawn in another order.
        with monkeypatch.context() as patch:
            training, objective = start(train)
            begun = adversary(objective).critic.last.weight.detach().clone()
            patch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.3))
            training.model.train()
            whole = make_batch(4)
            groups = [
                {name: tensor[part::parts] for name, tensor in whole.items()}
                for part in range(parts)
            ]
            for group in groups:
                group["hidden"] = group["image_of"] = torch.arange(4 // parts)
            train_step(training, groups, objective, objective.weights_at(0.0))
        results.append(adversary(objective).critic.last.weight.detach() - begun)
    # Power iteration advances with each micro-batch, so that the norms differ a little.
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=1e-4)
    assert results[0].abs().max() > 0.01


def test_a_critic_that_breaks_stops_training_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    training, objective = start()
    file = tmp_path / "last.pt"

    def log(values: dict[str, float], step: int) -> None:
        if step == 3:
            with torch.no_grad():
                adversary(objective).critic.last.bias.fill_(float("nan"))  # type: ignore[union-attr]

    hooks = Hooks(log=log, checkpoint=lambda: save_training(training, file, {}))
    with pytest.raises(UserError, match=r"loss holistic, holistic_critic, total is not finite at"):
        fit(training, objective, Loader(8), epochs=1, hooks=hooks, log_every=1, checkpoint_every=2)
    kept = torch.load(file, weights_only=True)
    assert kept["progress"]["step"] == 2
    weights = kept["parts"]["critics"]["holistic"]["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_checkpoint_with_a_broken_critic_is_not_written(tmp_path: Path) -> None:
    training, objective = start()
    with torch.no_grad():
        adversary(objective).critic.last.bias.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"holistic\.critic\.last\.bias is not finite"):
        save_training(training, tmp_path / "last.pt", {})
    assert not (tmp_path / "last.pt").exists()


class SmallPictures(Loader):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {**batch, "images": batch["images"][:, :, :8, :8].clone()}


@pytest.mark.slow
def test_a_critic_at_the_rates_of_the_segmentation_recipe_stays_finite(tmp_path: Path) -> None:
    steps = 500  # 2,000 with a critic of full width: benchmarks/critic.py
    poly = Schedule(name="poly", warmup=0.0)
    descent = Optimizer(name="sgd", lr=1e-2, momentum=0.9, weight_decay=5e-4)
    train = Train(
        optimizer=descent, schedule=poly, clip_norm=0.0, channels_last=False, precision="fp32"
    )
    pixels = build_term(TermSection(name="pixel_wise", weight=10.0, student="scores"))
    training, objective = start(train, steps, [pixels])
    logged: list[dict[str, float]] = []
    hooks = Hooks(
        log=lambda values, step: logged.append(values),
        checkpoint=lambda: save_training(training, tmp_path / "last.pt", {}),
    )
    epochs = steps // 100
    fit(training, objective, SmallPictures(100), epochs=epochs, hooks=hooks, log_every=10)
    assert training.progress.step == steps
    critic_losses = [line["loss/holistic_critic"] for line in logged if line]
    assert len(critic_losses) == steps // 10
    assert max(map(abs, critic_losses)) < 20.0  # begins near the penalty of a slope of 0: 10
