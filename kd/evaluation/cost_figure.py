"""Table and figure of accuracy against cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from kd.errors import UserError
from kd.report.style import COLOURS, GREY, INK, clean, colours
from kd.report.tables import Table

Kind = Literal["plain", "distilled", "teacher"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SHAPES = "osD^"  # of students, one after another where there are more than colours
_PANELS = (
    ("parameters", "parameters"),
    ("multiply_adds", "multiply-adds per image"),
    ("latency", "latency per image (ms)"),
)
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Places of a name: points to the right of and above its marker, and its alignment.
_PLACES: tuple[tuple[int, int, str, str], ...] = (
    *((7, 0, "left", "center"), (-7, 0, "right", "center")),
    *((0, 7, "center", "bottom"), (0, -7, "center", "top")),
    *((5, 5, "left", "bottom"), (5, -5, "left", "top")),
    *((-5, 5, "right", "bottom"), (-5, -5, "right", "top")),
)
_FAR: tuple[tuple[int, int, str, str], ...] = tuple(
    (reach * right, reach * up, across, along)
    for reach in (3, 5, 7)
    for right, up, across, along in _PLACES
)


@dataclass(frozen=True)
class CostPoint:
    """A trained network.

    Attributes:
        name: Equal for the plain and the distilled runs of a student.
        parameters: Number of parameters.
        multiply_adds: Per image.
        latency: Milliseconds per image.
        mean_iou: In 0..1.
        kind: How it was trained.
    """

    name: str
    parameters: float
    multiply_adds: float
    latency: float
    mean_iou: float
    kind: Kind


class Cost(NamedTuple):
    """Measured cost of a network."""

    point: CostPoint
    variant: str  # of its run
    sides: tuple[int, int]  # height and width of the image
    device: str


class Look(NamedTuple):
    """Marker style of a network."""

    colour: str
    shape: str


def cost_figure(points: Sequence[CostPoint]) -> Figure:
    """Plot mIoU against parameters, multiply-adds and latency, all logarithmic.

    An arrow leads from a plain student to each distilled one of its name. Names are placed where
    they overlap the least.

    Raises:
        UserError: No point, an unknown kind, a cost not above 0, or an mIoU outside of 0..1.
    """
    _check(points)
    figure = Figure(figsize=(11.0, 3.9))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    looks = _looks(points)
    for axes, (cost, label) in zip(panels, _PANELS, strict=True):
        _panel(axes, points, cost, looks)
        axes.set_xlabel(label)
    panels[0].set_ylabel("mIoU (%)")
    kinds = [kind for kind in KINDS if any(point.kind == kind for point in points)]
    handles = [_mark(kind, Look(GREY, "o")) for kind in kinds]
    figure.legend(handles, kinds, loc="outside upper center", ncols=len(kinds), frameon=False)
    figure.draw_without_rendering()  # computes positions
    figure.set_layout_engine("none")  # fixes them, as names are placed by them
    for axes, (cost, _) in zip(panels, _PANELS, strict=True):
        _write_names(axes, points, cost, looks)
    return figure


def cost_table(costs: Sequence[Cost]) -> Table:
    """The numbers of `cost_figure`, by multiply-adds."""
    lines = []
    for cost in sorted(costs, key=lambda cost: cost.point.multiply_adds):
        point, (height, width) = cost.point, cost.sides
        lines.append((
            point.name, cost.variant, f"{width} x {height}", f"{point.parameters / 1e6:.3g}",
            f"{point.multiply_adds / 1e9:.3g}", f"{point.latency:.3g}",
            f"{100 * point.mean_iou:.1f}",
        ))  # fmt: skip
    header = ("network", "run", "image", "parameters (M)", "multiply-adds (G)", "latency (ms)",
              "mIoU (%)")  # fmt: skip
    devices = ", ".join(dict.fromkeys(cost.device for cost in costs))
    note = f"latency: median of forward passes of single images on {devices}"
    return Table("Cost of networks", header, (tuple(lines),), (note,))


def _check(points: Sequence[CostPoint]) -> None:
    if not points:
        raise UserError("no networks to draw")
    for point in points:
        if point.kind not in KINDS:
            raise UserError(f"{point.name}: kind must be {', '.join(KINDS)}, got {point.kind}")
        for cost, _ in _PANELS:
            if not getattr(point, cost) > 0:
                raise UserError(f"{point.name}: {cost} must be above 0, got {getattr(point, cost)}")
        if not 0 <= point.mean_iou <= 1:
            raise UserError(f"{point.name}: mean_iou must be in 0..1, got {point.mean_iou}")


def _looks(points: Sequence[CostPoint]) -> dict[str, Look]:
    """Style by name: teachers are dark, students coloured."""
    looks = {point.name: Look(INK, "*") for point in points if point.kind == "teacher"}
    students = [name for name in dict.fromkeys(p.name for p in points) if name not in looks]
    for place, (name, colour) in enumerate(zip(students, colours(len(students)), strict=True)):
        looks[name] = Look(colour, _SHAPES[place // len(COLOURS) % len(_SHAPES)])
    return looks


def _mark(kind: Kind, look: Look, at: tuple[float, float] | None = None) -> Line2D:
    """A marker at a place or, without one, for the legend; plain students are hollow."""
    x, y = ([], []) if at is None else ([at[0]], [at[1]])
    return Line2D(
        x, y, linestyle="", zorder=3, marker="*" if kind == "teacher" else look.shape,
        markersize=11 if kind == "teacher" else 6, color=look.colour, markeredgewidth=1.4,
        markerfacecolor="white" if kind == "plain" else look.colour,
    )  # fmt: skip


def _place(point: CostPoint, cost: str) -> tuple[float, float]:
    return float(getattr(point, cost)), 100 * point.mean_iou


def _pairs(points: Sequence[CostPoint]) -> Iterator[tuple[CostPoint, CostPoint]]:
    """Each plain student with each distilled one of its name."""
    for before in points:
        for after in points:
            if (before.kind, after.kind, before.name) == ("plain", "distilled", after.name):
                yield before, after


def _panel(axes: Axes, points: Sequence[CostPoint], cost: str, looks: dict[str, Look]) -> None:
    """Draw markers and arrows."""
    clean(axes)
    axes.set_xscale("log")
    for point in points:
        axes.add_line(_mark(point.kind, looks[point.name], _place(point, cost)))
    axes.autoscale_view()
    for before, after in _pairs(points):
        axes.annotate(
            "", _place(after, cost), _place(before, cost), zorder=2,
            arrowprops={"arrowstyle": "-|>", "color": looks[after.name].colour, "lw": 1.1,
                        "shrinkA": 3.5, "shrinkB": 3.5},
        )  # fmt: skip
    axes.margins(x=0.14, y=0.12)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    """Format a number with its unit: 500k, 10M, 2G."""
    for size, letter in _UNITS:
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _write_names(
    axes: Axes, points: Sequence[CostPoint], cost: str, looks: dict[str, Look]
) -> None:
    """Write each name once, beside one of its points, in falling order of mIoU."""
    taken = [_around(axes, _place(point, cost)) for point in points]
    for pair in _pairs(points):
        ends = axes.transData.transform([_place(point, cost) for point in pair])
        taken.append(Bbox([ends.min(axis=0), ends.max(axis=0)]).padded(1))
    best_first = sorted(points, key=lambda point: -point.mean_iou)
    for name in dict.fromkeys(point.name for point in best_first):
        own = [_place(point, cost) for point in best_first if point.name == name]
        taken.append(_written(axes, name, own, looks[name].colour, taken))


def _around(axes: Axes, place: tuple[float, float]) -> Bbox:
    """Bounding box of a marker, pixels."""
    x, y = axes.transData.transform(place)
    half = 4 * axes.figure.dpi / 72
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _written(
    axes: Axes, name: str, places: Sequence[tuple[float, float]], colour: str, taken: Sequence[Bbox]
) -> Bbox:
    """Write a name where it overlaps least with other boxes; return its box in pixels."""
    frame = axes.get_window_extent()
    ink = tuple(0.75 * part for part in to_rgb(colour))  # letters are thinner than markers
    tried: list[tuple[float, int, Annotation, Bbox]] = []
    choices = [(place, one) for far in (_PLACES, _FAR) for place in places for one in far]
    for order, (place, (right, up, across, along)) in enumerate(choices):
        far = max(abs(right), abs(up)) > 10
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
        label = axes.annotate(
            name, place, (right, up), textcoords="offset points", ha=across, va=along,
            fontsize=7.5, color=ink, zorder=4, arrowprops=line if far else None,
        )  # fmt: skip
        box = _text_box(label)
        hidden = sum(_shared(box.padded(1), other) for other in taken)
        hidden += box.width * box.height - _shared(box, frame)
        tried.append((hidden, order, label, box))
        if hidden < 1:  # less than a pixel
            break
    _, _, best, box = min(tried, key=lambda one: one[:2])
    for _, _, label, _ in tried:
        if label is not best:
            label.remove()
    return box


def _text_box(label: Annotation) -> Bbox:
    """Bounding box of the letters, without the line to the marker, pixels."""
    label.get_window_extent()  # updates the text's position
    return Text.get_window_extent(label)


def _shared(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, pixels."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else float(both.width * both.height)
