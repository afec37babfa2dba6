"""What a network did on its test images, in a file: for networks that travel without those images."""

import json
from pathlib import Path

import torch

from cmpe_se.errors import UserError
from cmpe_se.inspecting.gathering import Gathered
from cmpe_se.inspecting.statistics import BlockStatistics
from cmpe_se.utils.tensor_files import UnreadableFileError, load_tensors, save_tensors

_STEPS = 65535  # of a share of the energy, from 0 to 1


def save_tested(tested: Gathered, path: Path) -> None:
    """Write predictions and statistics: classes and shares in 16 bits, probabilities and counts in single precision."""
    tensors = {
        "predicted": tested.predicted.to(torch.int16),
        "confidence": tested.confidence.float(),
        "labels": tested.labels.to(torch.int16),
    }
    described = []
    for number, block in enumerate(tested.blocks):
        counted, words = block.state()
        counted["histogram"] = counted["histogram"].float()  # whole numbers
        if "shares" in counted:
            counted["shares"] = (counted["shares"] * _STEPS).round().to(torch.uint16)
        tensors |= {f"{number}.{name}": tensor for name, tensor in counted.items()}
        described.append(words)
    save_tensors(tensors, path, {"blocks": json.dumps(described)})


def read_tested(path: Path) -> Gathered:
    """What :func:`save_tested` has written.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        tensors, words = load_tensors(path)
        blocks = []
        for number, described in enumerate(json.loads(words["blocks"])):
            own = {name.partition(".")[2]: each for name, each in tensors.items() if name.startswith(f"{number}.")}
            own["histogram"] = own["histogram"].double()
            if "shares" in own:
                own["shares"] = own["shares"].to(torch.int32) / _STEPS
            blocks.append(BlockStatistics.of_state(own, described))
        return Gathered(tensors["predicted"].long(), tensors["confidence"], tensors["labels"].long(), blocks)
    except (UnreadableFileError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; install the package again") from None
