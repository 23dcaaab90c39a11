"""List the layers of a student or teacher, to choose those that a recipe's terms read.

    python -m kd.layers resnet18            # the student of configs/distill/resnet18.yaml
    python -m kd.layers cnn                 # the teacher of configs/teacher/cnn.yaml
    python -m kd.layers timm/mobilenetv4_conv_small --depth 2
    python -m kd.layers mypackage.mymodule:MyNet --task segmentation --data camvid
    python -m kd.layers runs/distill/resnet18/scenes   # a finished run

Paths go to `student:` and `teacher:` of a term. Shapes are for one image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kd.cli import add_list, run_command, set_up_logging
from kd.errors import at_least

if TYPE_CHECKING:
    from kd.deploy.layers import Layer


def main(argv: Sequence[str] | None = None) -> int:
    """Build the model, run one image, and print a line for each layer."""
    args = _parser().parse_args(argv)
    set_up_logging()
    at_least("kd.layers", **{"--depth": (args.depth, 1)})
    from kd.deploy.layers import layers_of, open_model

    title, model = open_model(args.model, args.data, args.task)
    layers, outputs = layers_of(model)
    shown = [one for one in layers if one.path.count(".") < args.depth]
    if args.maps:
        shown = [one for one in shown if one.stride is not None]
    deeper = len(layers) - len(shown)
    sys.stdout.write(f"{title}\n{_table(shown)}")
    if deeper:
        sys.stdout.write(f"  {deeper} more layers; --depth shows those inside of these\n")
    sys.stdout.write(f"outputs, by name\n{_table(outputs)}")
    return 0


def _table(layers: Sequence[Layer]) -> str:
    """One line per layer: path, module, shape, stride and parameters."""
    rows = [("layer", "module", "shape", "stride", "parameters")]
    for one in layers:
        shape = " x ".join(map(str, one.shape))
        stride = "" if one.stride is None else str(one.stride)
        rows.append((one.path, one.kind, shape, stride, f"{one.parameters:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    aligned = [f"{'<' if column < 3 else '>'}{width}" for column, width in enumerate(widths)]
    lines = (zip(row, aligned, strict=True) for row in rows)
    return "".join(f"  {'  '.join(f'{cell:{how}}' for cell, how in line)}\n" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a recipe's name, a student's name, or a run folder")
    add("--data", metavar="NAME", help="dataset whose image size is used (default: the recipe's)")
    add("--task", default="classification", metavar="NAME",
        help="task of a student without a recipe (default: %(default)s)")  # fmt: skip
    add("--depth", type=int, default=4, metavar="N",
        help="show modules up to N levels deep (default: %(default)s)")  # fmt: skip
    add("--maps", action="store_true", help="show feature maps only")
    add_list(parser, "distill", "teacher", "students", "tasks", "data")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
