"""A network in eval mode as a program of each runtime: what ``cmpe-se export`` writes and ``benchmark`` measures."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from cmpe_se.runtimes.onnx_gates import keep_layout

INPUT, OUTPUT = "images", "logits"


def trace(network: nn.Module, input_size: Sequence[int]) -> ExportedProgram:
    """A network as a graph of PyTorch's operators, with a free batch dimension.

    Args:
        network: in eval mode, on the CPU; images (N, C, H, W) to logits (N, classes).
        input_size: (C, H, W).
    """
    example = torch.zeros(2, *input_size)  # of one image, torch.export would take the batch for fixed
    program = torch.export.export(network, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    for node in program.graph.nodes:  # paths of this machine do not belong in the file
        node.meta.pop("stack_trace", None)
    return program


def to_onnx(program: ExportedProgram) -> Any:
    """The ONNX model (a protobuf message) of a traced network, its merged gates in ONNX Runtime's operators."""
    return keep_layout(_as_exported(program))


def to_openvino(program: ExportedProgram) -> Any:
    """The OpenVINO model of a traced network."""
    # By way of ONNX: straight from the program, OpenVINO forgets channels, height and width.
    return openvino_core().read_model(_as_exported(program).SerializeToString())


def _as_exported(program: ExportedProgram) -> Any:
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


@cache
def openvino_core() -> Any:
    """OpenVINO, the same for the whole process.

    Each ``Core`` gives the thread a stack of its own for signals, and puts the one before back when it goes. Where a
    second one outlives the first, that stack is gone by then, and Ctrl-C would end the process with a segmentation
    fault (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()
