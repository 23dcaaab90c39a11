"""Export a trained model, run the exported file, and compare it with the model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from kd.data.loader import Sample, collate
from kd.deploy.model import TrainedModel, grey_sample
from kd.errors import UserError
from kd.problems.base import Dataset, Split
from kd.problems.inference import ExportGraph
from kd.problems.results import spread
from kd.utils.io import write_atomic
from kd.version import __version__

FORMATS = ("onnx", "torch-export", "torchscript")
OPSET = 20
TOLERANCE = 1e-4  # of the difference between the exported file and the model, see `Check`
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """How the outputs of an exported file differ from those of the model.

    Attributes:
        differences: For each output the largest absolute difference, divided by the largest
            absolute value of the model's output.
        model: Metrics of the model on the compared images.
        exported: Metrics of the exported file on these images.
        images: Number of compared images.
        seconds: Median time of a batch, of the model and of the exported file.
    """

    differences: dict[str, float]
    model: dict[str, float]
    exported: dict[str, float]
    images: int
    seconds: tuple[float, float]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings, log lines and prints of the exporters in a `with` block."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def export(model: TrainedModel, out: Path, format: str = "onnx") -> Path:
    """Write a model with its preprocessing and decoding to a file for another runtime.

    The number of images and of objects stays variable, for label maps and saliency also the size of
    the images. The file's metadata (`kd`, JSON) has class names, inputs, outputs and image size.

    Args:
        model: The model, on the CPU.
        out: File to write.
        format: `onnx`, `torch-export` (a .pt2 file) or `torchscript`.

    Raises:
        UserError: The format is unknown, a package is missing, or the model cannot be exported.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if format == "onnx":
        need_onnx()
    graph = graph_of(model)
    inputs = graph.feed(collate([grey_sample(model)] * 2))
    about = json.dumps(described(model, graph), ensure_ascii=False)
    with torch.no_grad():
        graph(*inputs.values())  # cached constants must be real tensors, not those of tracing
    try:
        with _quiet():
            write = _exported(graph, inputs, format, about)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{model.where}: cannot be exported to {format}: {reason}") from error
    with _quiet():
        write_atomic(out, write)
    return out


def _exported(
    graph: ExportGraph, inputs: Mapping[str, Tensor], format: str, about: str
) -> Callable[[Path], object]:
    """Trace the graph and return the function that writes the file."""
    given = tuple(inputs.values())
    if format == "torchscript":
        traced = torch.jit.trace(graph, given, check_trace=False)
        return lambda partial: torch.jit.save(traced, partial, _extra_files={"kd": about})
    program = torch.export.export(graph, given, dynamic_shapes=_dynamic(graph, inputs))
    if format == "torch-export":
        return lambda partial: _save_program(program, partial, about)
    converted = torch.onnx.export(
        program, dynamo=True, verbose=False, opset_version=OPSET,
        input_names=list(graph.inputs), output_names=list(graph.outputs),
    )  # fmt: skip
    assert converted is not None
    converted.model.metadata_props["kd"] = about
    return lambda partial: converted.save(str(partial))


def need_onnx() -> None:
    """Raise a UserError if a package for ONNX is not installed."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UserError(f"ONNX needs packages that are missing: pip install {' '.join(missing)}")


def graph_of(model: TrainedModel) -> ExportGraph:
    """The part of a model that is exported."""
    return model.inference.graph(model.model, model.task).eval()


def described(model: TrainedModel, graph: ExportGraph) -> dict[str, Any]:
    """Metadata of an exported file."""
    data = model.config["data"]
    return {
        "kd": __version__,
        "classes": list(model.class_names),
        "inputs": dict(graph.inputs),
        "outputs": dict(graph.outputs),
        "size": data.get("size"),
        "task": model.config["task"]["name"],
        "data": data["name"],
        **{key: model.config[key] for key in ("variant", "seed") if key in model.config},
    }


def _dynamic(graph: ExportGraph, inputs: Mapping[str, Tensor]) -> tuple[dict[int, Any], ...]:
    """Variable dimensions of each input: the first, and of some images height and width."""
    images, objects = Dim("images"), Dim("objects")
    shapes: list[dict[int, Any]] = [
        {0: images if name in ("images", "sizes") else objects} for name in inputs
    ]
    if graph.images_of_any_size:
        shapes[0] |= {2: Dim.AUTO, 3: Dim.AUTO}
    return tuple(shapes)


def _save_program(program: torch.export.ExportedProgram, partial: Path, about: str) -> None:
    buffer = io.BytesIO()  # torch.export.save wants the suffix .pt2
    torch.export.save(program, buffer, extra_files={"kd": about})
    partial.write_bytes(buffer.getvalue())


def quantise(
    file: Path, out: Path, model: TrainedModel, data: Dataset, how: str, *, images: int = 32
) -> Path:
    """Write an ONNX file whose convolutions and matrix products compute in 8-bit integers.

    Args:
        file: The float32 ONNX file.
        out: File to write.
        model: The model.
        data: Its dataset; train images measure the ranges of activations.
        how: `dynamic` (weights only; ranges are measured at run time) or `static`.
        images: Number of train images for `static`.

    Raises:
        UserError: The quantiser cannot process the graph.
    """
    from onnxruntime.quantization import (  # type: ignore[import-untyped]
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import (  # type: ignore[import-untyped]
        quant_pre_process,
    )

    graph = graph_of(model)
    arrays = (
        {name: tensor.numpy() for name, tensor in graph.feed(batch).items()}
        for batch in _batches(data, images, 4, "train")
    )
    reader = SimpleNamespace(get_next=lambda: next(arrays, None))

    def write(partial: Path) -> None:
        if how == "dynamic":
            quantize_dynamic(str(file), str(partial), weight_type=QuantType.QUInt8)
            return
        prepared = partial.with_suffix(".prepared")
        try:
            quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared), str(partial), reader, quant_format=QuantFormat.QDQ,
                per_channel=True, op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            )  # fmt: skip
        finally:
            prepared.unlink(missing_ok=True)

    try:
        with _quiet():
            write_atomic(out, write)
    except UserError:
        raise
    except Exception as error:  # onnxruntime raises many types
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: cannot be quantised: {first}") from error
    return out


def runner(file: Path, format: str, graph: ExportGraph) -> Runner:
    """Load an exported file and return the function that runs it on one thread."""
    names = list(graph.outputs)
    if format == "onnx":
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            found = session.run(names, arrays)
            return {name: torch.from_numpy(one) for name, one in zip(names, found, strict=True)}

        return run
    if format == "torch-export":
        with file.open("rb") as opened:
            module: Any = torch.export.load(io.BytesIO(opened.read())).module()
    else:
        with _quiet():
            module = torch.jit.load(str(file))

    def call(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return _named(module(*inputs.values()), names)

    return call


def _named(found: Any, names: Sequence[str]) -> dict[str, Tensor]:
    parts = (found,) if isinstance(found, Tensor) else tuple(found)
    return dict(zip(names, parts, strict=True))


def compare(
    model: TrainedModel, run: Runner, data: Dataset, *, images: int = 50, batch_size: int = 4
) -> Check:
    """Run an exported file and the model on val images and compare outputs and metrics.

    Args:
        model: The model, on the CPU.
        run: Runs the exported file, see `runner`.
        data: The dataset.
        images: Number of val images, spread over the split.
        batch_size: Images in a batch; images of different sizes come one at a time.
    """
    graph = graph_of(model)
    metrics = [model.task.metric(data.class_info()) for _ in range(2)]
    largest: dict[str, float] = {}
    difference: dict[str, float] = {}
    times: tuple[list[float], list[float]] = ([], [])
    count = 0
    with torch.no_grad():
        for batch in _batches(data, images, batch_size):
            inputs = graph.feed(batch)
            started = time.perf_counter()
            expected = _named(graph(*inputs.values()), list(graph.outputs))
            middle = time.perf_counter()
            found = run(inputs)
            times[0].append(middle - started)
            times[1].append(time.perf_counter() - middle)
            for name, tensor in expected.items():
                if tensor.is_floating_point() and tensor.numel() and name != "detections":
                    size = float(tensor.abs().max())
                    largest[name] = max(largest.get(name, 0.0), size)
                    gap = float((tensor - found[name]).abs().max())
                    difference[name] = max(difference.get(name, 0.0), gap)
            for metric, outputs in zip(metrics, (expected, found), strict=True):
                metric.take(graph.decoded(outputs, batch), batch)
            count += len(batch["images"])
    scores = [metric.compute() for metric in metrics]
    relative = {name: gap / max(largest[name], 1e-12) for name, gap in difference.items()}
    medians = (float(np.median(times[0])), float(np.median(times[1])))
    return Check(relative, scores[0], scores[1], count, medians)


def _batches(data: Dataset, images: int, batch_size: int, split: Split = "val") -> Iterator[Sample]:
    samples = data.problem.evaluation(data, split)
    places = spread(images, len(samples))
    each = samples.together(batch_size)
    for start in range(0, len(places), each):
        yield collate([samples[0, place] for place in places[start : start + each]])
