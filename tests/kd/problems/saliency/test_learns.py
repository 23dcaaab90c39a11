"""A student that learns where people look is better than looking at the centre, on every number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd.config.reader import find_config
from kd.config.recipes import DistillRecipe
from kd.experiments.distillation import Distillation
from kd.metrics.saliency import METRICS
from kd.problems.recipes import load_recipe
from kd.runs.build import make_accelerator, open_data

pytestmark = pytest.mark.slow

SIZE, PICTURES, PEOPLE = (48, 64), 60, 5


def squares(root: Path) -> Path:
    """Noise with one yellow square, which people look at wherever it is, in OSIE's layout."""
    (root / "stimuli").mkdir(parents=True)
    random, rows = np.random.default_rng(0), []
    for number in range(PICTURES):
        row, column = int(random.integers(2, 36)), int(random.integers(2, 52))
        pixels = random.integers(60, 120, (*SIZE, 3)).astype(np.uint8)
        pixels[row : row + 10, column : column + 10] = (250, 240, 60)
        Image.fromarray(pixels).save(root / "stimuli" / f"{number}.png")
        for person in range(PEOPLE):
            looks = random.normal((column + 5, row + 5), 3.0, (5, 2))
            looks = np.clip(looks, 0, (SIZE[1] - 0.1, SIZE[0] - 0.1))
            rows += [[number, person, *look] for look in looks]
    columns = np.array(["image", "subject", "x", "y"])
    np.savez(root / "fixations.npz", columns=columns, data=np.array(rows))
    return root


def test_student_a_is_no_constant_map(tmp_path: Path) -> None:
    settings = [
        f"data.root={squares(tmp_path / 'osie')}",
        f"data.size={list(SIZE)}",
        "data.degree=4.0",
        "data.workers=0",
        "variants=[plain]",
        "student.options={trunk: resnet18, width: 0.25, weights: null}",
        "train={epochs: 14, batch_size: 8, precision: fp32, evaluate_every: 0, images: 0, "
        "optimizer: {lr: 2.0e-3, lr_scale: {trunk: 1.0}}}",
    ]
    recipe = load_recipe(
        DistillRecipe,
        find_config("distill", "saliency_resnet18"),
        data="osie",
        settings=settings,
    )
    data = open_data(recipe.data)
    out = tmp_path / "students"
    Distillation(recipe, data, make_accelerator("fp32"), out).run("plain", 0)
    summary = json.loads((out / "seed0" / "plain" / "summary.json").read_text())
    assert summary["KLD"] < 0.8 * summary["prior_KLD"]
    for name in METRICS:
        if name != "KLD":
            assert summary[name] > summary[f"prior_{name}"] + 0.05, name
