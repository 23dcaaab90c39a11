"""Tables: their numbers, and how they are printed."""

from __future__ import annotations

import io
import math
import os

import numpy as np
import pytest
import torch

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.bootstrap import paired_interval
from kd.metrics.records import Records
from kd.problems.objects.evaluation import ObjectResults
from kd.problems.objects.metric import TopN
from kd.report.tables import distill_table, print_table, runs_table

LABELS = torch.arange(60) % 3
GROUPS = ("cup", "cup", None)
RESULTS = ObjectResults()


def records_of(strength: float, seed: int, *, confusable: bool = True) -> Records:
    """Predictions of sixty objects, the better the greater the strength."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 3, generator=generator)
    logits[torch.arange(60), LABELS] += strength
    metric = TopN(3, prior=[0.5, 0.3, 0.2], confusable=GROUPS if confusable else None)
    ids = torch.arange(60)
    metric.update(torch.log_softmax(logits, 1), LABELS, torch.full((60,), 0.01), ids, ids // 3)
    return metric.records()


def variants(seeds: int) -> dict[str, list[Records]]:
    strengths = {"plain": 0.5, "distilled": 2.0, "shuffled": 0.5}
    return {
        variant: [records_of(strength, 10 * place + seed) for seed in range(seeds)]
        for place, (variant, strength) in enumerate(strengths.items())
    }


def test_the_row_of_a_metric_is_the_mean_over_seeds_and_its_t_interval() -> None:
    runs = variants(4)
    table = distill_table(RESULTS, runs, [0, 1, 2, 3], metrics=["top1"])
    plain = np.array([scores.value(run, "top1") for run in runs["plain"]])
    distilled = np.array([scores.value(run, "top1") for run in runs["distilled"]])
    mean, low, high = paired_interval(distilled - plain)

    row = table.groups[0][0]
    assert table.header[:4] == ("metric", "plain", "distilled", "distilled - plain")
    assert row[0] == "top1 (%)"
    assert row[1:3] == (f"{100 * plain.mean():.1f}", f"{100 * distilled.mean():.1f}")
    assert row[3] == f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]*"
    assert table.comparisons[1].difference == pytest.approx((mean, low, high))


def test_every_seed_has_a_row_of_its_own_with_an_interval_over_images() -> None:
    table = distill_table(RESULTS, variants(2), [3, 8], metrics=["top1", "nll"])
    assert [row[0] for row in table.groups[1]] == [
        "top1 (%), seed 3",
        "top1 (%), seed 8",
        "nll (nats), seed 3",
        "nll (nats), seed 8",
    ]
    for entry in table.comparisons:
        for seed, interval in enumerate(entry.by_seed):
            assert interval.low <= interval.mean <= interval.high
            plain = next(c for c in table.comparisons if c.metric == entry.metric)
            expected = entry.values[seed] - plain.values[seed]
            assert interval.mean == pytest.approx(expected)


def test_one_seed_is_judged_over_images_and_says_so() -> None:
    table = distill_table(RESULTS, variants(1), [0])
    assert len(table.groups) == 1
    assert "one seed only" in table.to_text()
    entry = next(c for c in table.comparisons if c.variant == "distilled")
    assert entry.difference == entry.by_seed[0]


def test_equal_variants_differ_by_nothing() -> None:
    runs = [records_of(1.0, seed) for seed in range(3)]
    table = distill_table(RESULTS, {"plain": runs, "copy": runs}, range(3))
    assert {row[3].rstrip(" *") for row in table.groups[0]} == {
        "+0.0 [+0.0, +0.0]",
        "+0.000 [+0.000, +0.000]",
    }
    assert "*" not in "".join(row[3] for row in table.groups[0])


def test_metrics_that_the_objects_do_not_allow_are_left_out_unless_asked_for() -> None:
    runs = {"plain": [records_of(1.0, 0, confusable=False)]}
    names = {entry.metric.name for entry in distill_table(RESULTS, runs, [0]).comparisons}
    assert names == {"top1", "mean_class_top1", "nll", "ece"}  # no top5: three classes
    with pytest.raises(UserError, match="'confusable_top1': none of these objects"):
        distill_table(RESULTS, runs, [0], metrics=["confusable_top1"])
    with pytest.raises(UserError, match="'accuracy': unknown"):
        distill_table(RESULTS, runs, [0], metrics=["accuracy"])


def test_wrong_variants_are_refused() -> None:
    with pytest.raises(UserError, match="no run 'plain'"):
        distill_table(RESULTS, {"distilled": []}, [])
    runs = [records_of(1.0, 0)]
    with pytest.raises(UserError, match="'plain' has 1 runs for 2 seeds"):
        distill_table(RESULTS, {"plain": runs}, [0, 1])
    with pytest.raises(UserError, match="no run to show"):
        runs_table(RESULTS, {})


def test_single_runs_stand_side_by_side_with_prior_and_ceiling() -> None:
    runs = {"unet": records_of(2.0, 0), "cnn": records_of(0.5, 1)}
    table = runs_table(RESULTS, runs, ceilings={"top1": 0.95}, metrics=["top1", "nll", "ece"])
    assert table.header == ("metric", "unet", "cnn", "cnn - unet", "class prior", "ceiling")
    top1, nll, ece = table.groups[0]
    assert top1[4:] == ("33.3", "95.0")
    assert nll[4:] == (f"{-np.log([0.5, 0.3, 0.2]).mean():.3f}", "")
    assert ece[4:] == ("0.167", "")  # always 0.5 sure, right in a third
    assert "lower is better: nll, ece" in table.notes
    assert math.isnan(table.comparisons[-1].difference.low)  # type: ignore[union-attr]


def test_the_text_is_aligned_and_the_markdown_is_a_table() -> None:
    table = distill_table(RESULTS, variants(2), [0, 1], title="a | b")
    lines = table.to_text().splitlines()
    rule = next(line for line in lines if set(line) == {"-"})
    assert lines[0] == "a | b"
    assert all(len(line) <= len(rule) for line in lines[1 : lines.index(rule) + 3])

    markdown = table.to_markdown().splitlines()
    rows = [line for line in markdown if line.startswith("| ")]
    assert len(rows) == 2 + sum(len(group) for group in table.groups)
    assert {line.count("|") for line in rows} == {len(table.header) + 1}
    assert rows[1] == "| --- |" + " ---: |" * (len(table.header) - 1)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_rules_and_other_streams_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = distill_table(RESULTS, variants(1), [0], metrics=["top1"])
    plain = io.StringIO()
    print_table(table, plain)
    assert plain.getvalue() == table.to_text()

    size = os.terminal_size((200, 50))
    monkeypatch.setattr("shutil.get_terminal_size", lambda: size)
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    print_table(table, terminal)
    assert "─" in terminal.getvalue()
    assert "[" in terminal.getvalue()  # brackets are not taken for markup
    assert table.groups[0][0][3].strip() in terminal.getvalue()
