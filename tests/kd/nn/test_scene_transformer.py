"""Readers against a slow loop, and tokens that are grouped by scene."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.nn.scene_transformer import Reader, Rows, Tokens, place_features, relations

SCENES, TOKENS, WIDTH, HEADS = 3, 5, 8, 2


def given() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, tokens, rows out of order, relations, what is seen; one query sees nothing."""
    rows = torch.tensor([2, 0, 2, 2])
    seen = torch.rand(len(rows), TOKENS) < 0.6
    seen[1] = False
    return (
        torch.randn(len(rows), WIDTH),
        torch.randn(SCENES, TOKENS, WIDTH),
        rows,
        torch.randn(len(rows), TOKENS, 10),
        seen,
    )


def slow(
    reader: Reader, query: Tensor, tokens: Tensor, lie: Tensor, seen: Tensor, kind: str
) -> Tensor:
    """One query, head by head and token by token."""
    asked, size = reader.query(reader.before(query)), WIDTH // HEADS
    read = torch.zeros(WIDTH)
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = {}
        for token in range(TOKENS):
            if seen[token]:
                key = (reader.key(tokens[token]) + reader.lie_key(lie[token]))[part]
                scores[token] = float(
                    asked[part] @ key / math.sqrt(size) + reader.bias(lie[token])[head]
                )
        total = 1.0 + sum(math.exp(score) for score in scores.values())  # 1 for nothing at all
        for token, score in scores.items():
            weight = math.exp(score) / total if kind == "softmax" else 1 / (1 + math.exp(-score))
            read[part] += (
                weight * (reader.value(tokens[token]) + reader.lie_value(lie[token]))[part]
            )
    query = query + reader.join(read)
    answer: Tensor = query + reader.think(reader.after(query))
    return answer


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_reader_is_its_definition(kind: Literal["softmax", "sigmoid"]) -> None:
    reader = Reader(WIDTH, heads=HEADS, dropout=0.0, attention=kind).eval()
    queries, tokens, rows, lie, seen = given()
    with torch.no_grad():
        answers = reader(queries, Tokens(tokens, lie, seen, Rows.of(rows, len(tokens))))
        for k, row in enumerate(rows):
            expected = slow(reader, queries[k], tokens[row], lie[k], seen[k], kind)
            torch.testing.assert_close(answers[k], expected, rtol=1e-4, atol=1e-5)


def test_tokens_bring_queries_to_their_scenes_and_back() -> None:
    _, tokens, rows, *_ = given()
    source = Rows.of(rows, len(tokens))
    values = torch.arange(4.0)[:, None]
    groups = source.put(values)
    assert groups.shape == (SCENES, 3, 1)
    assert groups[0, :, 0].tolist() == [1, 0, 0] and groups[2, :, 0].tolist() == [0, 2, 3]
    assert torch.equal(source.take(groups), values)


def test_relations_say_where_a_token_lies() -> None:
    query = torch.tensor([[0.2, 0.2, 0.4, 0.4]])
    tokens = torch.tensor([[[0.2, 0.2, 0.4, 0.4], [0.5, 0.2, 0.9, 0.3]]])
    same, other = relations(query, tokens)[0]
    assert same[:6].tolist() == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6)  # covered by the query
    assert same[6:].tolist() == [1, 1, 1, 1]  # at every reach
    assert other[:2].tolist() == pytest.approx([0.4, -0.05])
    assert other[2:4].tolist() == pytest.approx([math.log(2), math.log(0.5)])
    assert other[4].item() == pytest.approx(math.hypot(0.4, 0.05)) and other[5].item() == 0


def test_place_features_tell_near_places_apart() -> None:
    boxes = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.12, 0.1, 0.22, 0.2]])
    first, second = place_features(boxes)
    assert (first - second).abs().max() > 0.3  # of boxes a fiftieth of the frame apart


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="heads 3 must divide width 8"):
        Reader(WIDTH, heads=3, dropout=0.0, attention="softmax")


def test_rows_put_each_scenes_objects_side_by_side() -> None:
    rows = Rows.of(torch.tensor([0, 2, 2, 2]))  # the second scene holds nothing
    assert rows.put(torch.tensor([1, 2, 3, 4])).tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4]]
    assert rows.put(torch.ones(4, 5)).shape == (3, 3, 5)
    assert Rows.of(torch.zeros(0, dtype=torch.int64)).put(torch.zeros(0, 2)).shape == (0, 0, 2)
