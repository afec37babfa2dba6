"""Static int8 quantisation of an ONNX file: convolutions and classifier; squeezes and gates stay float32."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.merging import MergedGate
from cmpe_se.runtimes.exported import Exported
from cmpe_se.runtimes.programs import INPUT
from cmpe_se.training.metrics import collect_logits, test_metrics
from cmpe_se.utils.packages import quiet
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.text import in_one_line

_TEST_BATCH = 256


def gate_names(network: nn.Module) -> tuple[str, ...]:
    """Names of a network's gates, merged or not."""
    gates = (CompetitiveSE, MergedGate)
    return tuple(name for name, module in network.named_modules() if isinstance(module, gates))


def quantise(source: Path, target: Path, images: Iterable[Tensor], gates: tuple[str, ...]) -> None:
    """Write an int8 form of an ONNX file: QDQ, weights by channel, ranges of activations from images.

    A gate is a few thousand multiplications, and its rounding would scale everything behind it: nothing to gain.

    Args:
        source: file of ``cmpe-se export``; its metadata is kept.
        target: file to write.
        images: normalised batches (B, C, H, W) to calibrate with.
        gates: names of the modules to leave alone.

    Raises:
        UserError: a network that cannot be quantised.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    excluded = _float_nodes(onnx.load(source).graph, gates)
    try:
        with quiet():
            quantize_static(
                source,
                target,
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm"],
                nodes_to_exclude=excluded,
                per_channel=True,
                activation_type=QuantType.QUInt8,  # signed ones are slower than float32 on x86
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},  # 256 values are few for logits
            )
    except (OSError, UserError):
        raise
    except Exception as error:  # onnxruntime raises many kinds
        raise UserError(f"cannot quantise the network: {in_one_line(error)}; export it without int8") from None


def _float_nodes(graph: Any, gates: tuple[str, ...]) -> list[str]:
    """Nodes that read a gate's weights, and all linear ones but the classifier: some of them map squeezes."""
    prefixes = tuple(f"{gate}." for gate in gates)
    outputs = {value.name for value in graph.output}
    return [
        node.name
        for node in graph.node
        if any(name.startswith(prefixes) for name in node.input)
        or (node.op_type == "Gemm" and outputs.isdisjoint(node.output))
    ]


class _Reader:
    """Batches in the way that onnxruntime's calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]):
        self._batches = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def accuracy(exported: Exported, data: ImageData, shown: str, console: Console) -> float:
    """Top-1 accuracy in percent on the whole test set; ``shown`` names the progress bar."""
    batches = data.test_batches(batch_size=_TEST_BATCH)
    steps = -(-data.test_size // _TEST_BATCH)
    bar = with_progress(batches, shown, steps, console=console)
    return test_metrics(*collect_logits(exported, bar))["test_top1"]
