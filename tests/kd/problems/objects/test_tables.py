"""Tables of an evaluation hold the numbers of `kd.metrics`, each in its place."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kd.metrics import classification as scores
from kd.metrics.bootstrap import bootstrap
from kd.metrics.classification import prior_records
from kd.metrics.confusion import beyond_prior, confusions, per_class
from kd.metrics.records import Records
from kd.problems.objects.evaluation import ObjectResults, ObjectsEvaluation
from kd.report.tables import difference_notes

NAMES = ("cup", "fork", "person")


def records_of(seed: int, strength: float = 1.5) -> Records:
    """Sixty objects, three an image, which holds two to four others."""
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    logits = rng.normal(size=(60, 3)) + strength * np.eye(3)[labels]
    ids = np.arange(60)
    return {
        "object_ids": ids,
        "image_ids": ids // 3,
        "labels": labels,
        "area_fractions": np.linspace(0.001, 0.1, 60),
        "log_probs": logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)),
        "visible": 2 + ids // 3 % 3,
        "prior": np.array([0.5, 0.3, 0.2]),
        "confusable": np.array([0, 0, -1]),
    }


def known(records: Records) -> dict[str, Records]:
    prior = prior_records(records)
    assert prior is not None
    return {"class prior": prior}


def evaluated(runs: dict[str, Records]) -> ObjectsEvaluation:
    references = known(next(iter(runs.values())))
    data = SimpleNamespace(class_names=NAMES, train_counts=lambda: np.array([5, 3, 2]))
    return ObjectsEvaluation(ObjectResults(), "title", {}, runs, references, lambda: data)


def test_one_run_has_a_line_for_each_metric_and_a_column_for_each_reference() -> None:
    run = records_of(0)
    table = evaluated({"cnn": run}).summary_tables()[0]
    assert table.header == ("metric", "cnn", "95 % interval", "random", "class prior")
    rows = {row[0]: row[1:] for row in table.groups[0]}
    assert list(rows) == ["top1 (%)", "top3 (%)", "mean_class_top1 (%)", "nll (nats)", "ece",
                          "confusable_top1 (%)", "confusable_pair_top1 (%)"]  # fmt: skip
    hits = scores.ranks(run["log_probs"], run["labels"]) == 0
    _, low, high = bootstrap(hits.astype(float), run["image_ids"])
    assert rows["top1 (%)"] == (
        f"{100 * hits.mean():.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]", "33.3", "33.3",
    )  # fmt: skip
    assert rows["nll (nats)"][2:] == ("1.099", f"{-np.log([0.5, 0.3, 0.2]).mean():.3f}")
    assert rows["ece"][1:3] == ("", "")  # no mean over objects; nothing to guess
    assert rows["confusable_pair_top1 (%)"][2] == "50.0"
    assert "lower is better: nll, ece" in table.notes
    assert any(note.startswith("difference from the class prior: ") for note in table.notes)


def test_several_runs_have_a_line_each_and_the_references_below() -> None:
    runs = {"cnn": records_of(0), "unet": records_of(1)}
    table = evaluated(runs).summary_tables()[0]
    above, below = table.groups
    assert [row[0] for row in above] == ["cnn", "unet"]
    assert [row[0] for row in below] == ["random", "class prior"]
    top1 = table.header.index("top1 (%)")
    for row, run in zip(above, runs.values(), strict=True):
        assert row[top1].startswith(f"{100 * (scores.value(run, 'top1') or 0):.1f} [")
        assert "[" not in row[table.header.index("mean_class_top1 (%)")]
    assert all("[" not in cell for row in below for cell in row)


def test_bins_count_their_objects_and_leave_out_what_is_not_known() -> None:
    run = records_of(0)
    table = evaluated({"cnn": run}).bins_table("visible")
    assert table is not None
    assert table.header == ("other objects in the image", "objects", "cnn", "class prior")
    assert [(row[0], row[1]) for row in table.groups[0]] == [("1 to 2", "21"), ("3 to 4", "39")]
    few = run["visible"] == 2
    hits = (scores.ranks(run["log_probs"], run["labels"]) == 0)[few]
    assert table.groups[0][0][2].startswith(f"{100 * hits.mean():.1f} [")
    fractions = evaluated({"cnn": run}).bins_table("fraction")
    assert fractions is not None
    assert sum(int(row[1]) for row in fractions.groups[0]) == 60
    old = {name: part for name, part in run.items() if name != "visible"}
    assert evaluated({"cnn": old}).bins_table("visible") is None


def test_classes_say_their_fractions_and_what_is_said_instead() -> None:
    run = records_of(0)
    rows = per_class(run)
    table = evaluated({"cnn": run}).class_table()
    line = dict(zip(table.header, table.groups[0][0], strict=True))
    assert line["class"] == "cup"
    assert (line["val objects"], line["val (%)"], line["train (%)"]) == (
        "20", "33.3", "50.0",
    )  # fmt: skip
    first = rows[0].instead[0]
    assert line["predicted instead"].startswith(
        f"{NAMES[first.predicted]} {100 * first.fraction:.0f} %"
    )
    both = evaluated({"cnn": run, "unet": records_of(1)}).class_table()
    assert both.header == ("class", "val objects", "cnn", "unet")
    assert both.groups[0][0][2] == line["top1 (%)"]


def test_confusions_are_listed_in_their_order_with_lift() -> None:
    run = records_of(0, strength=0.5)
    pairs = confusions(run)
    evaluation = evaluated({"cnn": run})
    table = evaluation.confusion_table("Confusions", pairs, most=2)
    assert len(table.groups[0]) == 2
    first = pairs[0]
    assert table.groups[0][0] == (
        NAMES[first.true], NAMES[first.predicted], str(first.count), f"{100 * first.fraction:.1f}",
        f"{100 * first.expected:.1f}", f"{first.lift:.1f}",
    )  # fmt: skip
    assert len(evaluation.confusion_table("t", beyond_prior(run)).groups[0]) <= len(pairs)


def test_the_notes_say_how_far_a_run_is_from_each_reference() -> None:
    run = records_of(0, strength=5.0)
    results, references = ObjectResults(), known(run)
    notes = difference_notes(results, run, references, ("top1", "nll"))
    gap = 100 * ((scores.value(run, "top1") or 0) - 1 / 3)
    assert notes[0].startswith(f"difference from the class prior: top1 (%) {gap:+.1f} [")
    assert "]*, nll (nats) -" in notes[0]
    assert difference_notes(results, run, {}, ("top1", "nll")) == []


@pytest.mark.parametrize("kind", ["fraction", "visible"])
def test_a_table_of_bins_is_markdown_without_line_breaks_in_cells(kind: str) -> None:
    table = evaluated({"cnn": records_of(0)}).bins_table(kind)
    assert table is not None
    lines = table.to_markdown().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
