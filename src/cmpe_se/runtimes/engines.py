"""Engines of a benchmark: eager PyTorch, its compiler, or ONNX Runtime; each as a step without arguments."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cmpe_se.errors import UserError

ENGINES = ("eager", "compiled", "cudagraphs", "onnxruntime")
MODES = ("forward", "training")
Network = Callable[[Tensor], Tensor]
Step = Callable[[], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def why_not(engine: str, mode: str, dtype: str, device: torch.device) -> str | None:
    """Why a combination cannot be measured, or None."""
    if engine == "cudagraphs" and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if engine == "onnxruntime" and mode == "training":
        return "ONNX Runtime does not train"
    if engine == "onnxruntime" and (dtype != "float32" or device.type != "cpu"):
        return "ONNX Runtime is measured in float32 on the CPU"
    return None


def make_step(network: nn.Module, images: Tensor, labels: Tensor, engine: str, mode: str, dtype: str) -> Step:
    """One forward pass without gradients, or one training step without the optimiser; warmed up.

    bfloat16 is the whole network's type in ``forward``, and autocast's in ``training``.

    Args:
        network: any, on the device and in the memory format to measure; it is changed.
        images: (N, C, H, W), float32.
        labels: (N,).
        engine: one of :data:`ENGINES`.
        mode: one of :data:`MODES`.
        dtype: one of :data:`DTYPES`.
    """
    if engine == "onnxruntime":
        return _onnxruntime_step(network, images)
    if mode == "forward":
        network = network.eval().to(DTYPES[dtype])
        step = _forward_step(_compiled(network, engine), images.to(DTYPES[dtype]))
    else:
        step = _training_step(_compiled(network.train(), engine), network, images, labels, dtype)
    try:
        for _ in range(3):
            step()
    except Exception as error:
        if engine == "eager":
            raise
        raise UserError(f"torch.compile failed: {str(error).splitlines()[0]}; measure --engines eager") from None
    return step


def _compiled(network: nn.Module, engine: str) -> Network:
    if engine == "eager":
        return network
    # Contenders share the code of their modules, and each has its own entry in that code's cache. One beyond the limit
    # would run uncompiled; a reset between them would have each compiled once more, within its first timed turn.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if engine == "cudagraphs" else None)


def _forward_step(network: Network, images: Tensor) -> Step:
    def step() -> None:
        with torch.inference_mode():
            network(images)

    return step


def _training_step(runs: Network, network: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Step:
    device = images.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = cross_entropy(runs(images), labels)
        loss.backward()
        for parameter in network.parameters():
            parameter.grad = None

    return step


def _onnxruntime_step(network: nn.Module, images: Tensor) -> Step:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("measuring ONNX Runtime needs it; pip install 'cmpe-se[export]'") from None
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format).eval()
    images = images.contiguous()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (images,), dynamo=True, verbose=False, optimize=True)
    assert program is not None  # as always with dynamo
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    file = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}

    def step() -> None:
        session.run(None, inputs)

    for _ in range(3):
        step()
    return step
