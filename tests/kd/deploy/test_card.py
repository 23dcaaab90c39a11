"""A distillation's model card has the hub's fields, the table, and how to load the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import kd

pytestmark = pytest.mark.slow


def test_the_card_describes_the_model_to_ship(students: dict[str, Path]) -> None:
    for problem, run in students.items():
        _, header, text = (run / "README.md").read_text().split("---\n", 2)
        fields = yaml.safe_load(header)
        assert fields["library_name"] == "kd" and fields["license"] == "unknown"
        [result] = fields["model-index"][0]["results"]
        best = kd.load(run).where.parent
        summary = json.loads((best / "summary.json").read_text())
        for metric in result["metrics"]:
            assert metric["value"] == pytest.approx(summary[metric["type"]], abs=1e-6)
        assert (run / "table.md").read_text().strip() in text
        file = best.relative_to(run) / "model.safetensors"
        assert f'kd.load("{file}")' in text and (run / file).is_file()
        assert f"{summary['parameters']:,} parameters" in text
        assert ("boxes=" in text) == (problem == "objects")
