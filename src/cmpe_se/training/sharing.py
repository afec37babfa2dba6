"""What the main process of a run knows, told to the others: their machines need neither the run folder nor weights."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.training.checkpoint import Checkpoints, with_marks, without_marks

_T = TypeVar("_T")


def told_by_main(make: Callable[[], _T]) -> _T:
    """What a function gives on the main process, on all processes of the run. The others do not call it.

    Raises:
        UserError: of the function, on all of them, so that none waits for another.
        OSError: of the function, on the main process; a UserError on the others.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    told: list[Any] = [None, None]
    own: Exception | None = None
    if state.is_main_process:
        try:
            told = [make(), None]
        except (UserError, OSError) as error:
            told, own = [None, str(error)], error
    broadcast_object_list(told)
    value, mistake = told
    if own is not None:
        raise own
    if mistake is not None:
        raise UserError(mistake)
    return value


@contextmanager
def one_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process goes first, then one process of each other machine, then all others.

    A folder that the machines share is filled once, and else each machine fills its own.
    """
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        yield


def refuse_other_images(accelerator: Accelerator, data: ImageData) -> None:
    """Compare what each process has loaded: machines with a disk each may have copies that differ.

    Raises:
        UserError: a process has other images than the main one.
    """
    if accelerator.num_processes == 1:
        return
    found = gather_object([(_digest(data), data.train_size, data.test_size)])
    for rank, (digest, train, test) in enumerate(found):
        if digest != found[0][0]:
            raise UserError(
                f"process {rank} has other images of {data.name} than process 0: {train} for training and {test} for "
                f"the test, instead of {found[0][1]} and {found[0][2]}, or others of the same number; give all "
                "machines the same copy"
            )


def _digest(data: ImageData) -> str:
    """Of sizes, classes, labels and, for class folders, file names; for images in memory also of their mean."""
    files: list[Any] = []
    if data.folders is not None:
        root = Path(data.folders.root)
        parts = (data.folders.train, data.folders.test)
        files = [[Path(path).relative_to(root).as_posix() for path, _ in part] for part in parts]
    try:
        labels = data.train_labels().tolist()
    except UserError:  # shards, which are not read beforehand
        labels = []
    words = json.dumps([data.train_size, data.test_size, data.preprocessing.to_dict(), labels, files])
    return hashlib.sha256(words.encode()).hexdigest()


def send_weights(accelerator: Accelerator, network: nn.Module) -> None:
    """Give a network on all processes the parameters and buffers that it has on the main one."""
    if accelerator.num_processes == 1:
        return
    with torch.no_grad():
        for tensor in chain(network.parameters(), network.buffers()):
            tensor.copy_(_sent(accelerator, tensor))


def load_checkpoint(accelerator: Accelerator, checkpoints: Checkpoints) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint that can be read, which the main process alone reads and sends.

    Raises:
        UserError: there are checkpoints, and none of them can be read.
    """
    if accelerator.num_processes == 1:
        return checkpoints.load()
    tensors: dict[str, Tensor] = {}

    def read() -> Any:
        if (loaded := checkpoints.load()) is None:
            return None
        marked = with_marks(loaded[0], tensors)
        return marked, {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}, loaded[1]

    if (told := told_by_main(read)) is None:
        return None
    marked, kinds, path = told
    for key, (shape, dtype) in kinds.items():
        mine = tensors[key] if accelerator.is_main_process else torch.empty(shape, dtype=dtype)
        tensors[key] = _sent(accelerator, mine)
    return without_marks(marked, tensors), path


def _sent(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The main process's tensor; other processes give one of the same shape and type."""
    sent = tensor.detach().to(accelerator.device, memory_format=torch.contiguous_format, copy=True)
    torch.distributed.broadcast(sent, src=0)
    return sent.to(tensor.device)
