"""Exported files give what the model gives, for any number of images and objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kd
from kd import export
from kd.data.loader import collate
from kd.deploy.export import FORMATS, compare, graph_of, runner
from kd.deploy.export import export as write
from kd.problems.inference import InputImage
from kd.problems.recipes import section_from
from kd.runs.build import open_data

pytestmark = pytest.mark.slow
PROBLEMS = ("objects", "segmentation", "saliency", "detection")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_file_agrees_with_its_model(
    students: dict[str, Path], tmp_path: Path, problem: str, format: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    model = kd.load(students[problem], device="cpu")
    file = write(model, tmp_path / "student.bin", format)
    assert file.stat().st_mode & 0o777 == 0o644
    run = runner(file, format, graph_of(model))
    data = open_data(section_from(dict(model.config), "config", []), model.config["task"]["name"])
    for batch_size in (1, 3):
        check = compare(model, run, data, images=6, batch_size=batch_size)
        assert check.images == 6
        assert check.differences and max(check.differences.values()) < 1e-4
        for name, value in check.model.items():
            assert check.exported[name] == pytest.approx(value, abs=1e-3, nan_ok=True), name


def test_an_onnx_file_describes_itself(students: dict[str, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = kd.load(students["objects"], seed=0, device="cpu")
    loaded = onnx.load(write(model, tmp_path / "student.onnx"))
    [about] = [one.value for one in loaded.metadata_props if one.key == "kd"]
    described = json.loads(about)
    assert described["classes"] == list(model.class_names) and described["size"] == 64
    assert [one.name for one in loaded.graph.input] == ["images", "boxes", "image_of"]
    assert [one.name for one in loaded.graph.output] == ["log_probs"]
    first = loaded.graph.input[0].type.tensor_type.shape.dim[0]
    assert first.dim_param and not first.dim_value  # the number of images is variable


def test_a_context_teacher_is_exported_too(small_teacher: Path, tmp_path: Path) -> None:
    model = kd.load(small_teacher, device="cpu")
    file = write(model, tmp_path / "teacher.pt2", "torch-export")
    image = np.full((32, 32, 3), 90, np.uint8)
    boxes = [[2, 2, 20, 18], [10, 4, 30, 30], [0, 0, 9, 9]]
    expected = model.predict(image, boxes).log_probs
    graph = graph_of(model)
    given = model.inference.samples(_input(image, boxes))
    found = runner(file, "torch-export", graph)(graph.feed(collate(given)))
    torch.testing.assert_close(found["log_probs"], expected, atol=1e-4, rtol=0)


def _input(image: np.ndarray, boxes: list[list[int]]) -> InputImage:
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return InputImage(pixels, (32, 32), torch.tensor(boxes, dtype=torch.float32))


def test_the_command_compares_and_quantises(
    students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "student.onnx"
    command = [str(students["segmentation"]), "--out", str(out), "--images", "4"]
    assert export.main([*command, "--int8", "static"]) == 0
    printed = capsys.readouterr().out
    assert "mIoU (%)" in printed and "4 val images, largest relative difference: logits" in printed
    small = tmp_path / "student.int8.onnx"
    assert small.stat().st_size < 0.7 * out.stat().st_size


def test_a_file_that_differs_is_refused_and_removed(
    students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from kd.deploy import export as deploy

    honest = deploy.runner

    def broken(*args: object) -> deploy.Runner:
        run = honest(*args)  # type: ignore[arg-type]
        return lambda inputs: {n: 1.01 * t if t.is_floating_point() else t
                               for n, t in run(inputs).items()}  # fmt: skip

    monkeypatch.setattr(deploy, "runner", broken)
    out = tmp_path / "student.pt2"
    command = [str(students["segmentation"]), "--format", "torch-export", "--out", str(out)]
    assert export.main(command) == 1
    assert "more than 0.0001" in capsys.readouterr().out and not out.exists()
