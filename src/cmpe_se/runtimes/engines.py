"""Engines of a benchmark: eager PyTorch, its compiler, ONNX Runtime or OpenVINO; each as a step without arguments."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.functional import cross_entropy

from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import onnx_session, openvino_network
from cmpe_se.runtimes.programs import to_onnx, to_openvino, trace
from cmpe_se.utils.packages import quiet, require
from cmpe_se.utils.text import in_one_line

OUTSIDE = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Engines outside PyTorch, and what people call them."""

ENGINES = ("eager", "compiled", "cudagraphs", *OUTSIDE)
MODES = ("forward", "training")
Network = Callable[[Tensor], Tensor]
Step = Callable[[], None]
Runner = Callable[[Tensor, Tensor], Step]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def why_not(engine: str, mode: str, dtype: str, device: torch.device) -> str | None:
    """Why a combination cannot be measured, or None."""
    if engine == "cudagraphs" and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if engine in OUTSIDE and mode == "training":
        return f"{OUTSIDE[engine]} does not train"
    if engine in OUTSIDE and (dtype != "float32" or device.type != "cpu"):
        return f"{OUTSIDE[engine]} is measured in float32 on the CPU"
    return None


def require_engine(engine: str) -> None:
    """Raise MissingPackageError where a package that an engine needs is not installed."""
    if engine in OUTSIDE:
        require(("onnx", "onnxscript", engine), f"measuring {OUTSIDE[engine]}", extra="export")


def make_runner(network: nn.Module, input_size: Sequence[int], engine: str, mode: str, dtype: str) -> Runner:
    """What makes steps of a network: one forward pass without gradients, or one training step without the optimiser.

    bfloat16 is the whole network's type in ``forward``, and autocast's in ``training``. ONNX Runtime and OpenVINO run
    what ``cmpe-se export`` writes: a program with a free batch dimension, which is made once for all batches.

    Args:
        network: any, on the device and in the memory format to measure; it is changed.
        input_size: (C, H, W).
        engine: one of :data:`ENGINES`.
        mode: one of :data:`MODES`.
        dtype: one of :data:`DTYPES`.

    Returns:
        A function of images (N, C, H, W), float32, and labels (N,) that returns a step, warmed up. It raises UserError
        where a compiler or an engine fails.
    """
    if engine in OUTSIDE:
        runs = _exported(network, input_size, engine)
    else:
        network = network.eval().to(DTYPES[dtype]) if mode == "forward" else network.train()
        compiled = _compiled(network, engine)

    def runner(images: Tensor, labels: Tensor) -> Step:
        if engine in OUTSIDE:
            contiguous = images.contiguous()
            step: Step = lambda: runs(contiguous)  # noqa: E731
        elif mode == "forward":
            step = _forward_step(compiled, images.to(DTYPES[dtype]))
        else:
            step = _training_step(compiled, network, images, labels, dtype)
        try:
            for _ in range(3):
                step()
        except Exception as error:
            if engine == "eager":
                raise
            what = f"{OUTSIDE[engine]} cannot run it" if engine in OUTSIDE else "torch.compile failed"
            raise UserError(f"{what}: {in_one_line(error)}; measure --engines eager") from None
        return step

    return runner


def make_step(network: nn.Module, images: Tensor, labels: Tensor, engine: str, mode: str, dtype: str) -> Step:
    """A step of :func:`make_runner` with one batch, warmed up."""
    return make_runner(network, images.shape[1:], engine, mode, dtype)(images, labels)


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


def _exported(network: nn.Module, input_size: Sequence[int], engine: str) -> Callable[[Tensor], None]:
    network = network.to(memory_format=torch.contiguous_format).eval()
    try:
        with quiet(), torch.no_grad():
            program = trace(network, input_size)
            if engine == "openvino":
                return _openvino(program)
            session = onnx_session(to_onnx(program).SerializeToString())
    except Exception as error:  # each exporter raises many kinds
        reason = in_one_line(error)
        raise UserError(
            f"{type(network).__name__} cannot be exported for {OUTSIDE[engine]}: {reason}; leave out engine {engine}"
        ) from None
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})


def _openvino(program: ExportedProgram) -> Callable[[Tensor], None]:
    network = openvino_network(to_openvino(program))
    return lambda images: network(images.numpy(), share_inputs=True, share_outputs=True)  # without copies
