"""Engines to export to: how to write, load and run a file of each."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tokenmerge.errors import UnsupportedError, unknown_name

__all__ = ["INPUT", "OUTPUT", "TARGETS", "Target", "find_target"]

INPUT, OUTPUT = "images", "answer"


def find_target(to: str) -> Target:
    """Return the target of this name; raise `UnknownNameError`, or `UnsupportedError` if a package is missing."""
    if to not in TARGETS:
        raise unknown_name("export target", to, TARGETS)
    for package in TARGETS[to].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UnsupportedError(
                f'exporting to {to} needs {package}: pip install "tokenmerge[{TARGETS[to].extra}]"'
            ) from error
    return TARGETS[to]


def _write_onnx(program: ExportedProgram, file: Path, opset: int | None) -> Counter[str]:
    onnx = importlib.import_module("onnx")
    # with gradients, attention decomposes to other strides than traced, and the views of some models fail
    with torch.no_grad():
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: "batch"}} if program.range_constraints else None,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    assert written is not None
    # weights above 2 GB go to a separate file
    written.save(file)
    graph = onnx.load(file, load_external_data=False)
    given = graph.opset_import[0].version
    if opset not in (None, given):
        raise UnsupportedError(
            f"opset {opset} was asked for and torch wrote {given}; leave opset out, or ask for less."
        )
    return Counter(_onnx_name(node) for node in graph.graph.node)


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Translate `sort` to ONNX TopK, which takes the first of equal values; torch translates only unstable sorts."""
    op = importlib.import_module("onnxscript").opset18
    count = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


def _onnx_name(node: Any) -> str:
    reductions = [attribute.s.decode() for attribute in node.attribute if attribute.name == "reduction"]
    return " ".join([node.op_type, *(name for name in reductions if name != "none")])


def _load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # spinning threads would take cores from the next run
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_openvino(program: ExportedProgram, file: Path, opset: int | None) -> Counter[str]:
    openvino = importlib.import_module("openvino")
    # via ONNX, because OpenVINO reads fewer of torch's own operators
    with TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        _write_onnx(program, onnx_file, opset)
        model = openvino.Core().read_model(onnx_file)
        for operator in model.get_ops():
            if operator.get_type_name() == "TopK":
                # OpenVINO's ONNX reader drops the rule that the first of equal values is taken
                operator.set_attribute("stable", True)
        openvino.save_model(model, file, compress_to_fp16=False)
    return Counter(operator.get_type_name() for operator in model.get_ops())


def _load_openvino(file: Path) -> Callable[[Tensor], Tensor]:
    compiled = _compiled(file, INFERENCE_PRECISION_HINT="f32")
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _load_openvino_plainly(file: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Load without a precision hint: OpenVINO then uses the fastest precision of the processor."""
    compiled = _compiled(file)
    name = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return name, lambda images: torch.from_numpy(compiled(images.numpy())[0])


def _compiled(file: Path, **settings: str) -> Any:
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), **settings}
    return openvino.Core().compile_model(file, "CPU", settings)


def _write_program(program: ExportedProgram, file: Path, opset: int | None) -> Counter[str]:
    torch.export.save(program, file)
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def _load_program(file: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(file).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)  # type: ignore[no-any-return]

    return run


class Target(NamedTuple):
    """An export format: its file suffix, its packages, and how to write and run it."""

    suffix: str
    engine: str  # the package that runs the file
    packages: tuple[str, ...]
    extra: str  # the extra that installs the packages
    write: Callable[[ExportedProgram, Path, int | None], Counter[str]]
    load: Callable[[Path], Callable[[Tensor], Tensor]]
    snippet: str  # how to load and run {file}
    # for engines whose default is not float32: load with the default, and return its precision
    plainly: Callable[[Path], tuple[str, Callable[[Tensor], Tensor]]] | None = None


_RUN_ONNX = f"""\
import onnxruntime
session = onnxruntime.InferenceSession("{{file}}")
answer = session.run(["{OUTPUT}"], {{{{"{INPUT}": images}}}})[0]  # images: numpy, float32"""
_RUN_OPENVINO = """\
import openvino
# without the hint OpenVINO takes the processor's fastest precision, on some bfloat16
compiled = openvino.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})
answer = compiled(images)[0]  # images: numpy, float32"""
_RUN_PROGRAM = """\
import torch
model = torch.export.load("{file}").module()
with torch.no_grad():
    answer = model(images)  # images: a tensor, float32"""


_ONNX = ("onnx", "onnxscript")
TARGETS = {
    "onnx": Target(".onnx", "onnxruntime", (*_ONNX, "onnxruntime"), "onnx", _write_onnx, _load_onnx, _RUN_ONNX),
    "openvino": Target(
        ".xml",
        "openvino",
        (*_ONNX, "openvino"),
        "openvino",
        _write_openvino,
        _load_openvino,
        _RUN_OPENVINO,
        _load_openvino_plainly,
    ),
    "torch-export": Target(".pt2", "torch", (), "", _write_program, _load_program, _RUN_PROGRAM),
}
