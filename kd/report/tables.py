"""Comparison tables: plain and distilled twins over seeds, or several runs side by side."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, paired_interval
from kd.metrics.classification import prior_records
from kd.metrics.records import Records
from kd.problems.records import kind_of
from kd.problems.saliency.baselines import notes

# Everything that is not listed here is an accuracy, shown in percent. Of saliency not even areas
# under curves are: papers write them as 0.86.
_UNITS = {"nll": " (nats)", "ece": "", "area": "", "KLD": " (nats)", "IG": " (bits)",
          **dict.fromkeys(("CC", "SIM", "NSS", "AUC_Judd", "sAUC"), "")}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One metric of one variant, and how far it is from the variant it is compared with."""

    metric: str
    variant: str
    values: tuple[float, ...]  # one a seed
    difference: Interval | None = None  # None: this is the variant that others are compared with
    by_seed: tuple[Interval, ...] = ()  # differences of each seed, over images

    @property
    def mean(self) -> float:
        """Over seeds."""
        return sum(self.values) / len(self.values)


def compare(
    name: str, variant: str, runs: Sequence[Records], twins: Sequence[Records] | None
) -> Comparison:
    """One metric of one variant; one seed alone is judged over images, not over seeds.

    Args:
        name: The metric.
        variant: What the runs are called.
        runs: Predictions, one a seed.
        twins: Those to compare with, None for the variant that others are compared with.

    Raises:
        UserError: The metric cannot be had.
    """
    values = tuple(value_of(name, run) for run in runs)
    if twins is None:
        return Comparison(name, variant, values)
    for twin in twins:
        value_of(name, twin)
    by_seed = tuple(
        kind_of(run).difference(run, twin, name) for twin, run in zip(twins, runs, strict=True)
    )
    if len(by_seed) == 1:
        return Comparison(name, variant, values, by_seed[0], by_seed)
    return Comparison(name, variant, values, paired_interval([i.mean for i in by_seed]), by_seed)


def value_of(name: str, records: Records) -> float:
    """A metric that must be there.

    Raises:
        UserError: There is no such metric, or nothing counts for it.
    """
    kind = kind_of(records)
    number = kind.value(records, name)
    if number is None:
        raise UserError(f"metric {name!r}: none of these {kind.things} counts for it")
    return number


def interval_of(name: str, records: Records) -> Interval | None:
    """A metric of one run with its 95 % interval over images; None where none can be had."""
    return kind_of(records).interval(records, name)


def label_of(name: str) -> str:
    """A metric with its unit."""
    return name + _UNITS.get(name, " (%)")


def scale_of(name: str) -> int:
    """What a metric is multiplied by to be shown: 100 for those in percent."""
    return 1 if name in _UNITS else 100


def number_cell(name: str, number: float | None) -> str:
    """A metric's number as tables show it, nothing where there is none."""
    if number is None:
        return ""
    return f"{number:.3f}" if scale_of(name) == 1 else f"{100 * number:.1f}"


def bounds_cell(name: str, interval: Interval | None) -> str:
    """[low, high] of a metric, nothing where nothing is known about them."""
    if interval is None or interval.low != interval.low:  # NaN
        return ""
    return f"[{number_cell(name, interval.low)}, {number_cell(name, interval.high)}]"


def difference_cell(name: str, interval: Interval) -> str:
    """A difference with its sign and bounds, and a star where it is clear of zero."""
    scale = scale_of(name)
    digits = 1 if scale == 100 else 3
    mean, low, high = (f"{scale * bound:+z.{digits}f}" for bound in interval)
    if interval.low != interval.low:  # NaN: nothing is known about the bounds
        return f"{mean} "
    return f"{mean} [{low}, {high}]{'*' if interval.clear_of_zero else ' '}"


CLEAR = "*: the 95 % interval does not touch zero"
_OVER_IMAGES = "the 95 % interval of images drawn again"

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Text to print, and the numbers behind it."""

    title: str
    header: Row
    groups: tuple[tuple[Row, ...], ...]  # rows; a line is drawn between groups
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    def to_text(self) -> str:
        """Aligned lines without colours."""
        rows = [self.header, *(row for group in self.groups for row in group)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(self.header))]

        def line(row: Row) -> str:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            return "  ".join(cells).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [self.title, line(self.header)]
        for group in self.groups:
            lines += [rule, *map(line, group)]
        return "\n".join([*lines, *self.notes]) + "\n"

    def to_markdown(self) -> str:
        """A heading, a table and a list of notes."""
        dashes = ["---", *["---:"] * (len(self.header) - 1)]
        rows = [self.header, tuple(dashes), *(row for group in self.groups for row in group)]
        cells = [
            "| " + " | ".join(cell.strip().replace("|", r"\|") for cell in row) + " |"
            for row in rows
        ]
        notes = [f"- {note.replace('*', chr(92) + '*')}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *cells, "", *notes]).rstrip() + "\n"


def print_table(table: Table, stream: TextIO | None = None) -> None:
    """Print with rules and colours on a terminal wide enough, as plain aligned lines elsewhere."""
    stream = stream or sys.stdout
    text = table.to_text()
    width = max(map(len, text.splitlines()))
    if not stream.isatty() or width + 8 > shutil.get_terminal_size().columns:
        stream.write(text)
        return
    drawn = rich.table.Table(
        title=table.title, box=rich.box.SIMPLE_HEAD, caption="\n".join(table.notes)
    )
    drawn.title_justify = drawn.caption_justify = "left"
    for place, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if place else "left", no_wrap=True)
    for group in table.groups:
        for row in group:
            drawn.add_row(*(Text(c, style="bold" if c.endswith("*") else "") for c in row))
        drawn.add_section()
    Console(file=stream).print(drawn)


def write_markdown(tables: Sequence[Table], path: Path) -> None:
    """Write tables one below the other.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(table.to_markdown() for table in tables), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def distill_table(
    variants: Mapping[str, Sequence[Records]],
    seeds: Sequence[int],
    *,
    metrics: Sequence[str] | None = None,
    title: str = "Plain and distilled",
    baseline: str = "plain",
) -> Table:
    """Each variant against its plain twin: mean over seeds with a t interval, then each seed alone.

    Args:
        variants: Variant -> predictions, one a seed, in the columns' order; all answer the same.
        seeds: One number for each place of those lists.
        metrics: Rows; by default those of the answers' kind that can be had.
        title: Above the table.
        baseline: The variant that others are compared with.

    Raises:
        UserError: No such variant, unequal numbers of seeds, or a metric that cannot be had.
    """
    _check_variants(variants, seeds, baseline)
    names = _chosen(metrics, variants[baseline][0])
    columns = [baseline, *(variant for variant in variants if variant != baseline)]
    found = {
        (name, variant): compare(
            name, variant, variants[variant], None if variant == baseline else variants[baseline]
        )
        for name in names
        for variant in columns
    }
    first = variants[baseline][0]
    references = kind_of(first).references(first)
    lines = {name: [found[name, variant] for variant in columns] for name in names}
    means = [
        _row(label_of(name), line, seed=None) + _reference_cells(name, references)
        for name, line in lines.items()
    ]
    by_seed = [
        _row(f"{label_of(name)}, seed {seed}", line, place) + _reference_cells(name, references)
        for name, line in lines.items()
        for place, seed in enumerate(seeds)
    ]
    header = ["metric", baseline]
    header += [cell for variant in columns[1:] for cell in (variant, f"{variant} - {baseline}")]
    header += references
    return Table(
        title=title,
        header=tuple(header),
        groups=(tuple(means), tuple(by_seed)) if len(seeds) > 1 else (tuple(means),),
        notes=(CLEAR, _seed_note(len(seeds)), *_prior_note(names, first), *notes(first)),
        comparisons=tuple(found.values()),
    )


def _check_variants(
    variants: Mapping[str, Sequence[Records]], seeds: Sequence[int], baseline: str
) -> None:
    if baseline not in variants or not seeds:
        raise UserError(
            f"no run {baseline!r} to compare with; there are {', '.join(variants) or 'none'}"
        )
    if wrong := [variant for variant, runs in variants.items() if len(runs) != len(seeds)]:
        raise UserError(
            f"variant {wrong[0]!r} has {len(variants[wrong[0]])} runs for {len(seeds)} seeds"
        )


def runs_table(
    runs: Mapping[str, Records],
    *,
    ceilings: Mapping[str, float] | None = None,
    metrics: Sequence[str] | None = None,
    title: str = "Runs",
) -> Table:
    """Single runs side by side, each compared with the first over the same images.

    Args:
        runs: Name -> predictions, all of the same objects or pictures.
        ceilings: Metric -> what the exact posterior reaches, where it is known.
        metrics: Rows; by default those of the answers' kind that can be had.
        title: Above the table.

    Raises:
        UserError: No run, or a metric that cannot be had.
    """
    if not runs:
        raise UserError("no run to show")
    first, *others = runs
    names = _chosen(metrics, runs[first])
    prior = prior_records(runs[first])
    references = kind_of(runs[first]).references(runs[first])
    ceilings = ceilings or {}
    found, rows = [], []
    for name in names:
        line = [
            compare(name, run, [runs[run]], [runs[first]] if run != first else None) for run in runs
        ]
        cells = list(_row(label_of(name), line, seed=None))
        if prior is not None:
            number = None if name == "ece" else kind_of(prior).value(prior, name)
            cells.append(number_cell(name, number))
        cells += _reference_cells(name, references)
        if ceilings:
            cells.append(number_cell(name, ceilings.get(name)))
        rows.append(tuple(cells))
        found += line
    header = ["metric", first]
    for run in others:
        header += [run, f"{run} - {first}"]
    header += ["prior"] * (prior is not None) + [*references] + ["ceiling"] * bool(ceilings)
    said = [CLEAR, f"differences: {_OVER_IMAGES}"] if others else []
    if ceilings:
        said.append("ceiling: the exact posterior of the scenes' own generative model")
    said += notes(runs[first])
    return Table(title, tuple(header), (tuple(rows),), tuple(said), tuple(found))


def _chosen(metrics: Sequence[str] | None, records: Records) -> list[str]:
    """The metrics asked for, checked; or those of the default that these records allow."""
    if metrics is None:
        kind = kind_of(records)
        return [name for name in kind.rows if kind.value(records, name) is not None]
    for name in metrics:
        value_of(name, records)
    return list(dict.fromkeys(metrics))


def _row(label: str, line: Sequence[Comparison], seed: int | None) -> Row:
    """Cells of a metric: of the mean over seeds, or of the seed at one place."""
    cells = [label]
    for entry in line:
        cells.append(number_cell(entry.metric, entry.mean if seed is None else entry.values[seed]))
        if entry.difference is not None:
            interval = entry.difference if seed is None else entry.by_seed[seed]
            cells.append(difference_cell(entry.metric, interval))
    return tuple(cells)


def _reference_cells(name: str, references: Mapping[str, Records]) -> Row:
    """A metric of what answers are held against."""
    return tuple(number_cell(name, kind_of(one).value(one, name)) for one in references.values())


def _seed_note(seeds: int) -> str:
    if seeds == 1:
        return f"one seed only: {_OVER_IMAGES}; nothing is known about other seeds"
    return f"means over {seeds} seeds, t interval; each seed: {_OVER_IMAGES}"


def _prior_note(names: Sequence[str], records: Records) -> list[str]:
    prior = prior_records(records)
    if prior is None:
        return []
    known = [(name, kind_of(prior).value(prior, name)) for name in names if name != "ece"]
    return [
        "class prior: "
        + ", ".join(f"{label_of(n)} {number_cell(n, number)}" for n, number in known)
    ]
