"""The variants of a comparison share all that is not compared."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.distillation.registry import TERMS, TermKind
from kd.distillation.terms import weighted_sum
from kd.engine.loop import forward_losses
from kd.engine.state import Objective
from kd.errors import UserError
from kd.experiments.distillation import Distillation
from kd.formats.coco import CocoIndex
from kd.formats.splits import labelled_images
from kd.losses import kl_logits
from kd.problems.objects.data import ObjectsDataset
from kd.problems.recipes import load_recipe
from kd.runs.build import make_accelerator, make_loader, open_data

VARIANTS: tuple[str, ...] = ("plain", "distilled", "no_context", "shuffled", "output_kd")
CONTEXT = ("context", "strength")


def recipe(small_data: list[str], teacher: Path, *settings: str) -> DistillRecipe:
    given = [text for text in small_data if text != "--set"]
    return load_recipe(
        DistillRecipe,
        find_config("distill", "resnet18"),
        settings=[
            *given,
            "student={name: shufflenet_v2_x0_5, options: {stride: 16, dropout: 0.2}}",
            "variants=[plain, distilled, no_context, shuffled, output_kd]",
            "data.labelled=0.5",
            "train={epochs: 1, batch_size: 8, precision: fp32}",
            f"teacher.run={teacher}",
            *settings,
        ],
    )


def distillation(small_data: list[str], teacher: Path, *settings: str) -> Distillation:
    asked = recipe(small_data, teacher, *settings)
    return Distillation(asked, open_data(asked.data), make_accelerator("fp32"), teacher.parent)


@pytest.fixture(scope="module")
def variants(small_data: list[str], small_teacher: Path) -> Distillation:
    return distillation(small_data, small_teacher)


def train_index(variants: Distillation) -> CocoIndex:
    assert isinstance(variants.data, ObjectsDataset)
    return variants.data.train


def weights(variants: Distillation, variant: str, seed: int = 0) -> dict[str, Tensor]:
    model, _ = variants.assemble(variant, seed, variants.samples(variant, seed))
    return model.state_dict()


def test_every_variant_starts_from_the_same_weights(variants: Distillation) -> None:
    plain = weights(variants, "plain")
    assert any("context" in name for name in plain)
    taught: tuple[str, ...] = ("distilled", "shuffled")
    for variant in taught:
        other = weights(variants, variant)
        assert other.keys() == plain.keys()
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    bare: tuple[str, ...] = ("no_context", "output_kd")
    for variant in bare:
        other = weights(variants, variant)
        missing = {name.split(".")[1] for name in plain.keys() - other.keys()}
        assert all(name.startswith(CONTEXT) for name in missing)
        assert all(torch.equal(plain[name], other[name]) for name in other)
    learned = [
        name for name, tensor in plain.items() if name.endswith("weight") and tensor.ndim > 1
    ]
    again = weights(variants, "plain", seed=1)
    assert any(not torch.equal(plain[name], again[name]) for name in learned)


def test_every_variant_sees_the_same_pixels_in_the_same_order(variants: Distillation) -> None:
    batches = []
    for _ in range(2):
        dataset = variants.samples("plain", 0)
        loader = make_loader(
            dataset, variants.accelerator, batch_size=8, workers=0, seed=0, train=True
        )
        loader.set_epoch(3)
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_labels_are_withheld_but_posteriors_are_not(variants: Distillation) -> None:
    labelled = labelled_images(train_index(variants), 0.5, 0)
    assert labelled is not None and len(labelled) == 12
    dataset = variants.samples("plain", 0)
    model, objective = variants.assemble("distilled", 0, dataset)
    batch = variants.first_batch(dataset)
    known = batch["labels"] >= 0
    owners = batch["image_ids"][batch["image_of"]]
    assert torch.equal(known, torch.isin(owners, torch.from_numpy(labelled)))
    assert objective.soft_targets is not None
    assert objective.soft_targets(batch, objective.task.rows(batch))["posterior"].shape == (
        len(batch["hidden"]),
        22,
    )
    without = {**batch, "labels": torch.full_like(batch["labels"], -1)}
    losses = forward_losses(model.eval(), without, objective)
    assert losses["cross_entropy"].value == 0
    assert losses["context_logits"].value > 0


def test_shuffled_posteriors_are_all_there_but_nobodys_own(variants: Distillation) -> None:
    assert variants.sources is not None
    own = variants.sources.posteriors[""].log_probs
    samples = variants.samples("shuffled", 0)
    for seed in (0, 1):
        source = variants.assemble("shuffled", seed, samples)[1].soft_targets
        assert source is not None
        other = source.posteriors.log_probs  # type: ignore[attr-defined]
        same = (own == other).all(dim=1)
        twice = torch.unique(own, dim=0, return_counts=True)[1].max() > 1
        assert twice or not same.any()
        key = np.lexsort(own.numpy().T), np.lexsort(other.numpy().T)
        assert np.array_equal(own.numpy()[key[0]], other.numpy()[key[1]])
    assert variants.assemble("no_context", 0, samples)[1].soft_targets is None


def test_a_plain_student_shows_the_terms_curves_and_learns_nothing_from_them(
    variants: Distillation,
) -> None:
    dataset = variants.samples("plain", 0)
    batch = variants.first_batch(dataset)
    gradients, values = [], []
    for terms in (True, False):
        model, objective = variants.assemble("plain", 0, dataset)
        model.eval()
        if not terms:
            objective = Objective(objective.task, objective.weights)
        losses = forward_losses(model, batch, objective)
        values.append(losses)
        scale = dict.fromkeys(("hidden", "labelled"), 1.0)
        weighted_sum(losses, objective.weights_at(0.5), scale).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert values[0]["context_logits"].value > 0
    assert not values[0]["context_logits"].value.requires_grad
    assert values[0].keys() - values[1].keys() == {"context_logits"}
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_twins_write_the_same_tags(variants: Distillation) -> None:
    names = []
    dataset = variants.samples("plain", 0)
    twins: tuple[str, ...] = ("plain", "distilled", "shuffled")
    for variant in twins:
        model, objective = variants.assemble(variant, 0, dataset)
        names.append(list(forward_losses(model, variants.first_batch(dataset), objective)))
    assert names[0] == names[1] == names[2]


def test_a_check_builds_every_variant_and_trains_none(variants: Distillation) -> None:
    torch.manual_seed(0)
    files = sorted(variants.out.rglob("*"))
    variants.check()
    assert sorted(variants.out.rglob("*")) == files


MAPS = (
    "soft_targets={kind: live}",
    "variants=[plain, distilled]",
    "losses=[{name: context_features, weight: 0.1, student: seen_map, teacher: features.2}]",
    "adapters={seen_map: {kind: conv1x1, to: features.2}}",
)


MAPS_OF_A_LAYER = [text.replace("seen_map", "trunk.trunk.maxpool") for text in MAPS]


def live(small_data: list[str], teacher: Path, layer: str, *settings: str) -> Distillation:
    changed = [text.replace("seen_map", layer) for text in MAPS]
    return distillation(small_data, teacher, *changed, *settings)


def test_a_live_teacher_stays_frozen_and_is_tapped_once(
    small_data: list[str], small_teacher: Path
) -> None:
    variants = live(small_data, small_teacher, "trunk.trunk.maxpool")
    variants.check()
    variants.check()
    assert variants.sources is not None and variants.sources.live
    teacher = variants.sources.teacher.model
    layer = teacher.get_submodule("features.2")
    assert len(layer._forward_hooks) == 1
    dataset = variants.samples("plain", 0)
    model, objective = variants.assemble("distilled", 0, dataset)
    before = copy.deepcopy(teacher.state_dict())
    model.train()
    losses = forward_losses(model, variants.first_batch(dataset), objective)
    losses["context_features"].value.backward()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapters = model.adapters
    assert isinstance(adapters, nn.ModuleDict)
    assert all(p.grad is not None for p in adapters.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["soft_targets={kind: live}"], "shuffled needs soft_targets.kind=stored"),
        (["losses=[{name: pair_wise, weight: 1.0, student: trunk, teacher: features.2}]"],
         "shuffled is the control of posteriors, not of pair_wise"),
        ([*MAPS_OF_A_LAYER, "data.size=64"], "data.size 64: the teacher saw 32"),
        ([*MAPS_OF_A_LAYER[:2], MAPS_OF_A_LAYER[2].replace("features.2", "mean.neck")],
         r"a mean over teachers must be mean.posterior or mean.logits, not 'mean\.neck'"),
        ([*MAPS], "unknown layer 'seen_map'"),
        (["task.weights={cross_entropy: 1.0, other: 1.0}"], "unmatched: other"),
        (["losses=[{name: context_logits, weight: 1.0, student: kontext}]"],
         "the student gives no 'kontext'"),
        (["losses=[{name: hint, weight: 1.0, student: logits, teacher: logits}]",
          "variants=[distilled]", "soft_targets.top_k=5"],
         "top_k the cache has only probabilities of logits; set"),
        (["soft_targets={out_of_fold: false}", "teacher={run: nowhere}"], "no such run"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_trains(
    settings: list[str], message: str, small_data: list[str], small_teacher: Path
) -> None:
    with pytest.raises(UserError, match=message):
        distillation(small_data, small_teacher, *settings).check()


@pytest.mark.parametrize("softmax", [True, False])
def test_a_loss_of_ones_own_says_whether_it_compares_probabilities(
    softmax: bool, small_data: list[str], small_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return kl_logits(student, teacher)

    kind = TermKind(divergence, "like kl_logits", unit="object", softmax=softmax)
    monkeypatch.setitem(TERMS, "divergence", kind)
    settings = [
        "losses=[{name: divergence, weight: 1.0, student: context, teacher: posterior}]",
        "variants=[distilled]",
        "soft_targets.top_k=5",
    ]
    if softmax:
        distillation(small_data, small_teacher, *settings).check()
    else:
        with pytest.raises(
            UserError,
            match=r"divergence: .* only probabilities of posterior; set",
        ):
            distillation(small_data, small_teacher, *settings)
