"""The code of docs/deploy.md runs, word for word but for the names of its files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kd import distill, export

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_the_page_s_code_runs(small_scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    settings = [
        f"data.root={small_scenes}", "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.workers=0", "train={epochs: 1, batch_size: 8, images: 0, precision: fp32}",
        "seeds=[0]", "variants=[plain]",
    ]  # fmt: skip
    flags = [text for setting in settings for text in ("--set", setting)]
    run = tmp_path / "runs" / "distill" / "centernet_resnet18" / "scenes"
    command = ["--student", "centernet_resnet18", *flags, "--out", str(run)]
    assert distill.main(command) == 0
    assert export.main([str(run), "--out", str(tmp_path / "student.onnx"), "--images", "4"]) == 0
    Image.new("RGB", (120, 80), (90, 120, 60)).save(tmp_path / "photo.jpg")
    page = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        ran = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "student.safetensors").is_file()
