"""Kinds of scene: against the sum over kinds written out, and found in data made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.nn.scene_transformer import Rows, SceneKinds, Tokens, place_features

CLASSES, KINDS = 4, 3
BOXES = torch.tensor([[0.1, 0.1, 0.4, 0.3], [0.5, 0.2, 0.7, 0.9], [0.2, 0.6, 0.9, 0.8]])


def company(kinds: SceneKinds, classes: Tensor, seen: Tensor) -> Tokens:
    """Scenes (N, 3) of objects in the same three places, each hidden once; seen is (3, 3)."""
    count = len(classes)
    said = kinds.evidence(classes.flatten(), BOXES.repeat(count, 1))
    rows = torch.arange(count).repeat_interleave(3)
    lie = torch.zeros(3 * count, 3, 10)
    tokens = said.unflatten(0, (count, 3))
    return Tokens(tokens, lie, seen.repeat(count, 1), Rows.of(rows, count))


def test_an_answer_is_the_mixture_over_kinds() -> None:
    kinds = SceneKinds(CLASSES, width=8, kinds=KINDS).eval()
    torch.nn.init.normal_(kinds.often)
    classes, seen = torch.tensor([[0, 3, 1]]), ~torch.eye(3, dtype=torch.bool)
    seen[2, 0] = False
    logits = torch.randn(3, CLASSES)
    answers = kinds(BOXES, company(kinds, classes, seen), logits)
    evidence = kinds.evidence(classes[0], BOXES)
    for row in range(3):
        known = sum((evidence[other] for other in range(3) if seen[row, other]), kinds.often)
        each = kinds.belongs(place_features(BOXES[row])).view(KINDS, CLASSES) + logits[row]
        mixed = sum(torch.softmax(known, 0)[k] * each[k].softmax(0) for k in range(KINDS))
        torch.testing.assert_close(answers[row].exp(), mixed)


def test_answers_are_finite_though_all_kinds_are_dropped() -> None:
    kinds = SceneKinds(CLASSES, width=8, kinds=2, dropout=0.9)
    answers = kinds(BOXES, company(kinds, torch.tensor([[0, 3, 1]]), ~torch.eye(3).bool()),
                    torch.zeros(3, CLASSES))  # fmt: skip
    answers.sum().backward()
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(3))
    assert all(p.grad is None or p.grad.isfinite().all() for p in kinds.parameters())


def test_kinds_that_nobody_named_are_found() -> None:
    # Two kinds of scene; which one a scene is, its classes say together: 0 or 1, then 2 or 3.
    drawn = torch.randint(2, (512, 1)) * 2 + torch.randint(2, (512, 3))
    kinds = SceneKinds(CLASSES, width=16, kinds=KINDS)
    optimizer = torch.optim.Adam(kinds.parameters(), lr=1e-2)
    seen, truth = ~torch.eye(3, dtype=torch.bool), drawn.flatten()
    asked, nothing = BOXES.repeat(512, 1), torch.zeros(len(truth), CLASSES)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.nll_loss(
            kinds(asked, company(kinds, drawn, seen), nothing), truth
        )
        loss.backward()
        optimizer.step()
    answers = kinds.eval()(asked, company(kinds, drawn, seen), nothing).exp()
    of_its_kind = answers.unflatten(1, (2, 2)).sum(dim=2)[torch.arange(len(truth)), truth // 2]
    assert of_its_kind.min() > 0.95  # nothing tells the two classes of a kind apart
