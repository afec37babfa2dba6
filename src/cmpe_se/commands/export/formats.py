"""Writers: a network in eval mode to a file of each format, with its metadata inside."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import METADATA, SUFFIXES
from cmpe_se.runtimes.native_packages import compile_package, save_package
from cmpe_se.utils.packages import quiet
from cmpe_se.utils.text import in_one_line

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch-export": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "aoti": (),
}
"""What writing each format needs."""


INPUT, OUTPUT = "images", "logits"


def write(network: nn.Module, path: Path, to: str, *, input_size: Sequence[int], metadata: dict[str, Any]) -> None:
    """Write a network with a free batch dimension, float32.

    Args:
        network: in eval mode, on the CPU; images (N, C, H, W) to logits (N, classes).
        path: file to write; OpenVINO's weights go beside it, in a file of the same name with .bin.
        to: one of :data:`SUFFIXES`.
        input_size: (C, H, W).
        metadata: kept as JSON under :data:`METADATA`.

    Raises:
        UserError: a network that the exporter cannot trace or express.
        OSError: a file that cannot be written.
    """
    formats: dict[str, tuple[Callable[[ExportedProgram], Any], Callable[[Any, Path, str], None]]] = {
        "onnx": (_to_onnx, _save_onnx),
        "torch-export": (lambda program: program, _save_torch_export),
        "openvino": (_to_openvino, _save_openvino),
        "aoti": (compile_package, save_package),
    }
    convert, save = formats[to]
    try:
        with quiet(), torch.no_grad():
            converted = convert(_trace(network, input_size))
    except Exception as error:  # each exporter raises many kinds
        others = " or ".join(name for name in SUFFIXES if name != to)
        reason = in_one_line(error)
        raise UserError(f"{type(network).__name__} cannot be exported to {to}: {reason}; try {others}") from None
    try:
        with quiet():
            save(converted, path, json.dumps(metadata))
    except OSError:
        raise
    except Exception as error:  # what C++ makes of a full disk
        raise OSError(in_one_line(error)) from None


def _trace(network: nn.Module, input_size: Sequence[int]) -> ExportedProgram:
    example = torch.zeros(2, *input_size)  # of one image, torch.export would take the batch for fixed
    program = torch.export.export(network, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    for node in program.graph.nodes:  # paths of this machine do not belong in the file
        node.meta.pop("stack_trace", None)
    return program


def _to_onnx(program: ExportedProgram) -> Any:
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "batch"},),
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    assert exported is not None  # as always with dynamo
    model = exported.model_proto
    for part in (
        *model.graph.node,
        *model.graph.value_info,
    ):  # the exporter's notes, with paths of this machine
        del part.metadata_props[:]
    return model


def _to_openvino(program: ExportedProgram) -> Any:
    import openvino

    # By way of ONNX: straight from the program, OpenVINO forgets channels, height and width.
    return openvino.Core().read_model(_to_onnx(program).SerializeToString())


def _save_torch_export(program: ExportedProgram, path: Path, metadata: str) -> None:
    archive = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, archive, extra_files={METADATA: metadata})
    path.write_bytes(archive.getbuffer())


def _save_onnx(model: Any, path: Path, metadata: str) -> None:
    model.metadata_props.add(key=METADATA, value=metadata)
    path.write_bytes(model.SerializeToString())


def _save_openvino(model: Any, path: Path, metadata: str) -> None:
    import openvino

    model.set_rt_info(metadata, [METADATA])
    openvino.save_model(model, path, compress_to_fp16=False)
