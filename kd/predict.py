"""Predict images with a trained model, without its dataset and its teacher.

    python -m kd.predict runs/distill/centernet_resnet18/scenes photos --out predictions
    python -m kd.predict runs/distill/resnet18/scenes photos --annotations boxes.json

Boxes are written as a COCO file with scores, label maps and saliency maps as PNG files, and the
first images with their predictions drawn over them. A classifier of objects needs boxes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.cli import run_command, set_up_logging
from kd.errors import at_least


def main(argv: Sequence[str] | None = None) -> int:
    """Load the model, predict the images, and print what was written."""
    args = _parser().parse_args(argv)
    set_up_logging()
    at_least(
        "kd.predict",
        **{
            "--batch-size": (args.batch_size, 1),
            "--overlays": (args.overlays, -1),
            "--score": (args.score, 0),
        },
    )
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from kd.deploy.model import load
    from kd.deploy.write import find_images, write_predictions

    model = load(args.run, variant=args.variant, seed=args.seed, device=args.device)
    images = list(find_images(args.images))
    written = write_predictions(
        model, images, args.out, annotations=args.annotations, overlays=args.overlays,
        least_score=args.score, batch_size=args.batch_size,
    )  # fmt: skip
    sys.stdout.write(f"{model.where}: {len(images)} image{'s' * (len(images) != 1)}\n")
    sys.stdout.write("".join(f"  {path}\n" for path in written))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or a model's .safetensors file")
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of images")
    add("--out", type=Path, default=Path("runs/predict"), metavar="DIR",
        help="output folder (default: %(default)s)")  # fmt: skip
    add("--annotations", type=Path, metavar="COCO.json",
        help="boxes to classify; also ids of images and classes for results.json")  # fmt: skip
    add("--variant", metavar="NAME", help="variant of a distillation (default: distilled)")
    add("--seed", type=int, metavar="N", help="seed of a distillation (default: the best on val)")
    add("--score", type=float, default=0.0, metavar="S", help="leave out boxes with a lower score")
    add("--overlays", type=int, default=16, metavar="N",
        help="number of images to draw, -1 for all (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=16, metavar="N", help="images per pass (default: 16)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
