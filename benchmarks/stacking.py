"""What multiplies: merging with lower precision, compilation and other engines; write `results/stacking-*.md`.

accuracy   a linear probe and the cosine of a CLIP tower, in every setting at every r
speed      time of the same in turn, over the unmerged model in the same setting and in float32 (nothing else may
           run beside it)

Takes what real.py takes. A setting that cannot run, for one because its engine is not installed, is named and left out.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from photographs import BATCH
from real import Work, reader, start
from torch import Tensor, nn

import tokenmerge
from tokenmerge.errors import TokenMergeError
from tokenmerge.measure.timing import interleave
from tokenmerge.tools.engines import INPUT
from tokenmerge.tools.export import TARGETS, export

AMOUNTS = (0, 8, 16)
ENGINES = ("torchao", "onnxruntime", "openvino", "nncf")
Run = Callable[[Tensor], Tensor]  # [B, 3, H, W] to [B, C]
Build = Callable[[nn.Module, Tensor, Path], Run]  # a patched model of float32, images to calibrate on, an empty folder


def eager(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run the model as it is."""
    return model


def bfloat16(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run the model in bfloat16."""
    model = model.to(torch.bfloat16)
    return lambda x: model(x.bfloat16())


def dynamic(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run linear layers in int8 by torch's own eager quantisation."""
    run: Run = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return run


def torchao(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run linear layers in int8, weights and activations, by torchao."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def compiled(build: Build, model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Compile what another setting built."""
    run = build(model, images, folder)
    return torch.compile(run)


def onnxruntime(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run the exported model in onnxruntime."""
    _export(model, folder / "model.onnx", "onnx")
    return TARGETS["onnx"].load(folder / "model.onnx")


def onnxruntime_int8(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run the exported model in onnxruntime, with matrix products in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _export(model, folder / "model.onnx", "onnx")
    quantize_dynamic(
        folder / "model.onnx",
        folder / "int8.onnx",
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
    )
    return TARGETS["onnx"].load(folder / "int8.onnx")


def openvino(precision: str, model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run the exported model in OpenVINO in a precision."""
    import openvino

    _export(model, folder / "model.xml", "openvino")
    return _openvino(openvino.Core().read_model(folder / "model.xml"), precision)


def openvino_int8(model: nn.Module, images: Tensor, folder: Path) -> Run:
    """Run the exported model in OpenVINO, quantised to int8 by NNCF on the images."""
    import nncf
    import openvino

    _export(model, folder / "model.xml", "openvino")
    data = nncf.Dataset(list(images.split(1)), lambda image: {INPUT: image.numpy()})
    found = openvino.Core().read_model(folder / "model.xml")
    return _openvino(nncf.quantize(found, data, model_type=nncf.ModelType.TRANSFORMER), "f32")


def _export(model: nn.Module, path: Path, to: str) -> None:
    export(model, path, to=to, r=None if tokenmerge.handle_of(model, None) else 0)


def _openvino(model: Any, precision: str) -> Run:
    import openvino

    ready = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda images: torch.from_numpy(ready(images.numpy())[0])


SETTINGS: dict[str, Build] = {
    "float32": eager,
    "bfloat16": bfloat16,
    "compile": partial(compiled, eager),
    "bfloat16, compile": partial(compiled, bfloat16),
    "int8 (quantize_dynamic)": dynamic,
    "int8 (torchao)": torchao,
    "int8 (torchao), compile": partial(compiled, torchao),
    "onnxruntime": onnxruntime,
    "onnxruntime, int8": onnxruntime_int8,
    "OpenVINO": partial(openvino, "f32"),
    "OpenVINO, bfloat16": partial(openvino, "bf16"),
    "OpenVINO, int8 (NNCF)": openvino_int8,
}


def built(work: Work, setting: str, r: int, folder: Path) -> Run:
    """Return a copy of the tower, patched and then brought into a setting; `ImportError` where an engine is missing."""
    twin = copy.deepcopy(work.model)
    if r:
        tokenmerge.patch(twin, r=r)
    folder = folder / f"{setting} {r}".replace("/", " ")
    folder.mkdir()
    return SETTINGS[setting](twin, work.calibration.float(), folder)


@torch.inference_mode()
def answers(run: Run, images: Tensor) -> Tensor:
    """Return the embeddings of all images; the last ones are run twice rather than in a smaller batch."""
    found = torch.cat([run(_filled(part)).float()[: len(part)] for part in images.split(BATCH)])
    return found


def _filled(part: Tensor) -> Tensor:
    return part if len(part) == BATCH else torch.cat([part, part[-1:].expand(BATCH - len(part), -1, -1, -1)])


def accuracy(work: Work) -> None:
    """Tell what each setting costs, alone and with merging."""
    journal = work.journal("stacking-accuracy", ["setting"])
    for setting, r in _asked(work):
        key = f"{setting}, {r}"
        if key in journal.rows:
            continue
        row: dict[str, Any] = {"setting": setting, "r": r}
        try:
            with tempfile.TemporaryDirectory() as folder:
                row |= work.features.of(answers(built(work, setting, r, Path(folder)), work.data.images))
        except (ImportError, RuntimeError, TokenMergeError) as error:
            print(f"{key}: {_said(error)}", flush=True)
            continue  # no row: the next run tries again
        journal.add(key, row)
        print(row, flush=True)
    columns = ("setting", "r", "probe %", "±", "agree %", "cosine", "KL")
    rows = [{name: row[name] for name in columns} for row in journal.rows.values()]
    work.about |= _engines()
    work.write("stacking-accuracy", "Merging with other ways to be faster: what they cost", rows, work.notes)


def speed(work: Work) -> None:
    """Time each setting unmerged and merged, with the unmerged model in float32 beside them."""
    journal = work.journal("stacking-speed", ["setting"])
    images = work.data.images[:BATCH]
    for setting in SETTINGS:
        if any(row["setting"] == setting for row in journal.rows.values()):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                calls = {str(r): partial(built(work, setting, r, Path(folder)), images) for r in AMOUNTS}
                plain = partial(work.model, images)
                timed = interleave({"float32": plain, **calls}, work.device, rounds=work.arguments.rounds)
        except (ImportError, RuntimeError, TokenMergeError) as error:
            print(f"{setting}: {_said(error)}", flush=True)
            continue
        for r in AMOUNTS:
            row = {
                "setting": setting,
                "r": r,
                "images/s": round(BATCH / timed[str(r)].median, 2),
                "over unmerged, same setting": round(timed["0"].over(timed[str(r)]), 3),
                "over unmerged, float32": round(timed["float32"].over(timed[str(r)]), 3),
            }
            journal.add(f"{setting}, {r}", row)
            print(row, flush=True)
    rows = [{k: v for k, v in row.items() if k != "key"} for row in journal.rows.values()]
    notes = [f"Batch {BATCH}; speed-ups are of interleaved rounds."]
    work.about |= _engines()
    work.write("stacking-speed", "Merging with other ways to be faster: the time", rows, notes)


def _asked(work: Work) -> Iterator[tuple[str, int]]:
    return ((setting, r) for setting in SETTINGS for r in AMOUNTS)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _engines() -> dict[str, str]:
    return {name: found for name in ENGINES if (found := _version(name))}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


PARTS: dict[str, Callable[[Work], None]] = {"accuracy": accuracy, "speed": speed}


if __name__ == "__main__":
    start(reader(__doc__, PARTS), PARTS)
