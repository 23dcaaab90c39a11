"""A tiny finished student of each problem, trained without a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

GENERATED = "data.generate={train: 12, val: 8, size: 64, seed: 0}"
STUDENTS = {
    "objects": ("resnet18", ["student={name: shufflenet_v2_x0_5, options: {stride: 16}}"]),
    "segmentation": ("espnet", []),
    "saliency": ("saliency_resnet18", ["student.options.trunk=shufflenet_v2_x0_5"]),
    "detection": ("centernet_resnet18", []),
}


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a distillation with seeds 0 and 1 (objects) or 0 for each problem."""
    from kd import distill

    folder = tmp_path_factory.mktemp("students")
    for problem, (recipe, settings) in STUDENTS.items():
        seeds = "seeds=[0, 1]" if problem == "objects" else "seeds=[0]"
        every = [
            GENERATED, f"data.root={folder / 'data' / problem}", "data.workers=0", seeds,
            "train={epochs: 1, batch_size: 4, images: 0, precision: fp32}", "variants=[plain]",
            *settings,
        ]  # fmt: skip
        flags = [text for setting in every for text in ("--set", setting)]
        out = folder / problem
        assert distill.main(["--student", recipe, *flags, "--out", str(out)]) == 0
    return {problem: folder / problem for problem in STUDENTS}


@pytest.fixture(scope="session")
def val_images(students: dict[str, Path]) -> dict[str, Path]:
    """The folder of each problem's val images."""
    folders = {}
    for problem, run in students.items():
        [folder] = [path for path in (run.parent / "data" / problem).rglob("val") if path.is_dir()]
        folders[problem] = folder
    return folders
