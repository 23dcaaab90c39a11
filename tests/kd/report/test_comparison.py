"""Figures draw what they are given, and nothing warns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.records import Records
from kd.problems.objects import figures
from kd.problems.objects.draw import hidden_scene_figure
from kd.problems.objects.evaluation import ObjectResults
from kd.problems.objects.metric import TopN
from kd.problems.saliency import metric as saliency_scores
from kd.problems.saliency.evaluation import SaliencyResults
from kd.report.comparison import comparison_figure
from kd.report.style import BLUE, ORANGE, figure_image, letters_on, save_figure
from kd.report.tables import distill_table


def records_of(strength: float, seed: int) -> Records:
    """Predictions of ninety objects of every size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(90) % 6
    logits = torch.randn(90, 6, generator=generator)
    logits[torch.arange(90), labels] += strength
    metric = TopN(6, prior=[1.0] * 6, visible=lambda images: images % 3)
    ids = torch.arange(90)
    fractions = torch.logspace(-3, -0.5, 90)
    metric.update(torch.log_softmax(logits, 1), labels, fractions, ids, ids // 3)
    return metric.records()


def drawn(figure: Figure) -> torch.Tensor:
    """The image, which must hold more than white."""
    image = figure_image(figure)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert (image != 255).any()
    return image


def test_the_top_n_figure_has_a_line_for_each_curve_random_ideal_prior_and_ceiling() -> None:
    unet = records_of(1.0, 0)
    known = {"class prior": records_of(0.0, 1), "exact posterior": records_of(9.0, 2)}
    figure = figures.top_n_figure({"unet": unet}, known)
    labels = [str(line.get_label()).split(" (")[0] for line in figure.axes[0].lines]
    assert labels == ["random", "ideal", "class prior", "exact posterior", "unet"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), np.arange(1, 7) / 6)
    np.testing.assert_array_equal(figure.axes[0].lines[-1].get_ydata(), scores.curve(unet))
    drawn(figure)
    one = {"log_probs": np.zeros((2, 1)), "labels": np.zeros(2, np.int64)}
    drawn(figures.top_n_figure({"one class": one}))


def test_fractions_hidden_and_reliability_are_drawn_for_every_run() -> None:
    runs = {"unet": records_of(2.0, 0), "cnn": records_of(0.5, 1)}
    hidden = figures.bins_figure("fraction", runs)
    assert len(hidden.axes[0].patches) == 2 * len(scores.FRACTION_BINS)
    drawn(hidden)
    drawn(figures.reliability_figure(runs))


def test_bars_have_their_runs_top1_and_lines_their_references() -> None:
    runs, known = {"cnn": records_of(2.0, 0)}, {"class prior": records_of(0.0, 1)}
    figure = figures.bins_figure("visible", runs, known)
    axes = figure.axes[0]
    bins = ["0", "1-2"]
    expected = [100 * (scores.value(runs["cnn"], f"visible/{b}_top1") or 0.0) for b in bins]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected)  # type: ignore[attr-defined]
    lines = next(c for c in axes.collections if c.get_label() == "class prior")
    heights = [segment[0][1] for segment in lines.get_segments()]  # type: ignore[attr-defined]
    assert heights == pytest.approx(
        [100 * (scores.value(known["class prior"], f"visible/{b}_top1") or 0.0) for b in bins]
    )
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0\n30 objects", "1 to 2\n60 objects"]
    assert axes.get_ylim()[0] == 0
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["cnn", "class prior"]  # type: ignore[union-attr]
    drawn(figure)


def test_a_run_that_is_never_right_is_drawn_with_its_zeros_inside() -> None:
    records = {**records_of(0.0, 0)}
    records["log_probs"] = np.log(np.where(np.eye(6)[(records["labels"] + 1) % 6] > 0, 0.95, 0.01))
    figure = figures.bins_figure("visible", {"a run of a rather long name, plain, seed 0": records})
    drawn(figure)  # text far outside of the axes would leave no room for them, and warn
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0", "0"]
    tops = [text.xy[1] for text in axes.texts]  # type: ignore[attr-defined]
    assert max(tops) < axes.get_ylim()[1]


def test_a_long_legend_has_as_many_rows_as_it_needs() -> None:
    few, many = ({f"run{n}": records_of(1.0, n) for n in range(count)} for count in (3, 9))
    found = [figures.bins_figure("visible", runs).axes[0].get_legend() for runs in (few, many)]
    assert [legend._ncols for legend in found] == [3, 5]  # type: ignore[union-attr]


def test_letters_are_read_on_every_colour() -> None:
    assert [letters_on(colour) for colour in (BLUE, ORANGE, "#000000", "#ffffff")] == [
        "white", "black", "white", "black",
    ]  # fmt: skip


def test_the_comparison_has_a_panel_for_each_accuracy_and_a_bar_for_each_variant() -> None:
    runs = {"plain": [records_of(0.5, s) for s in (0, 1)], "distilled": [records_of(2, 2)] * 2}
    table = distill_table(ObjectResults(), runs, [0, 1])
    figure = comparison_figure(table)
    titles = [axes.get_xlabel() for axes in figure.axes]
    assert titles == ["top1 (%)", "mean_class_top1 (%)", "top5 (%)"]
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 2]
    drawn(figure)
    alone = comparison_figure(distill_table(ObjectResults(), runs, [0, 1], metrics=["nll"]))
    assert [axes.get_xlabel() for axes in alone.axes] == ["nll (nats)"]


def test_a_comparison_of_saliency_has_a_panel_for_each_number_also_below_zero() -> None:
    def records(seed: int, mean: float) -> Records:
        rows = {
            image: dict.fromkeys(saliency_scores.TRUTH, 3.0)
            | {name: mean + 0.01 * ((image + seed) % 5) for name in saliency_scores.ROWS}
            for image in range(12)
        }
        return saliency_scores.records_of(rows)

    runs = {"plain": [records(s, -0.2) for s in (0, 1)], "B": [records(s, -0.1) for s in (2, 3)]}
    table = distill_table(SaliencyResults(), runs, [0, 1])
    figure = comparison_figure(table)
    titles = [axes.get_xlabel() for axes in figure.axes]
    assert titles == ["KLD (nats)", "CC", "SIM", "NSS", "AUC_Judd", "sAUC", "IG (bits)"]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low < -0.18 and high > 0
    drawn(figure)


def test_the_hidden_scene_covers_the_object_and_names_the_true_class() -> None:
    image = torch.randint(0, 255, (3, 40, 40), dtype=torch.uint8)
    names = ["cup", "ball", "fork", "spoon"]
    beliefs = {"teacher": torch.tensor([0.7, 0.1, 0.1, 0.1]), "student": torch.eye(4)[3]}
    figure = hidden_scene_figure(
        image, [5, 5, 25, 20], "fork", beliefs, names, size=(30, 40), top=2
    )
    scene, thing, teacher, student = figure.axes
    assert scene.images[0].get_array().shape == (30, 40, 3)  # type: ignore[union-attr]
    cover = scene.patches[0]
    assert cover.get_alpha() is None
    assert thing.get_title() == "hidden: fork"
    assert teacher.get_title() == "the teacher expects"
    assert "fork: place 2" in [text.get_text() for text in student.texts][-1]
    assert teacher.get_xlim() == student.get_xlim()
    drawn(figure)
    box = torch.tensor([0.0, 0.0, 0.4, 0.4])  # smaller than a pixel
    drawn(hidden_scene_figure(image, box, "cup", beliefs, names))


def test_a_figure_is_saved_and_a_bad_name_refused(tmp_path: Path) -> None:
    figure = figures.top_n_figure({"unet": records_of(1.0, 0)})
    save_figure(figure, tmp_path / "new" / "curve.png")
    with Image.open(tmp_path / "new" / "curve.png") as saved:
        assert saved.size[0] > 400
    with pytest.raises(UserError, match=r"curve.xyz: the figure cannot be written"):
        save_figure(figure, tmp_path / "curve.xyz")
