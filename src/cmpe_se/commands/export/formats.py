"""Writers: a network in eval mode to a file of each format, with its metadata inside."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import METADATA, SUFFIXES
from cmpe_se.runtimes.native_packages import compile_package, save_package
from cmpe_se.runtimes.programs import to_onnx, to_openvino, trace
from cmpe_se.utils.packages import quiet
from cmpe_se.utils.text import in_one_line

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch-export": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "aoti": (),
}
"""What writing each format needs."""


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
        "onnx": (to_onnx, _save_onnx),
        "torch-export": (lambda program: program, _save_torch_export),
        "openvino": (to_openvino, _save_openvino),
        "aoti": (compile_package, save_package),
    }
    convert, save = formats[to]
    try:
        with quiet(), torch.no_grad():
            converted = convert(trace(network, input_size))
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
