"""How the processes of a run meet where torchrun may start them again (``--max-restarts``).

Its store outlives them, and PyTorch looks up the processes' addresses there under the same names at each start: it may
find those of processes that have ended, and does not get on. So each start gets a number, and names of its own. Which
start it is the processes have to find out from the store, where the notes of earlier starts are: torchrun's own count
differs between machines, as a machine whose processes were well counts no restart.
"""

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed

from cmpe_se.errors import UserError
from cmpe_se.training.launching import agent_store, note_start
from cmpe_se.utils.devices import choose_device

_LONGEST = timedelta(minutes=10)  # a machine may be that much slower to import PyTorch from a shared disk
_LOOK = 0.05  # seconds between two looks at the store


def meet(*, cpu: bool) -> None:
    """Initialise PyTorch's process group for this start, where there may be several; else Accelerate will do it.

    Args:
        cpu: for processes that compute on CPUs.
    """
    store = agent_store() if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else None
    if store is None or torch.distributed.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    number = agree_on_start(store, rank, world)
    note_start(number)
    device = torch.device("cpu") if cpu else choose_device()
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device),
        store=torch.distributed.PrefixStore(f"cmpe_se/start-{number}", store),
        rank=rank,
        world_size=world,
    )


def agree_on_start(store: torch.distributed.Store, rank: int, world: int, longest: timedelta = _LONGEST) -> int:
    """The number of this start, from 1, which the main process gives and answers for to each of the others.

    An earlier start's number is in the store too, but nobody is there to answer for it.

    Args:
        store: that all starts share.
        rank: of this process; 0 for the main one.
        world: number of processes.
        longest: to wait for the others.

    Raises:
        UserError: they have not come.
    """
    end = time.monotonic() + longest.total_seconds()
    if rank == 0:
        number = store.add("cmpe_se/starts", 1)
        store.set("cmpe_se/newest", str(number))
        waiting = set(range(1, world))
        while waiting:
            for other in sorted(waiting):
                asked = f"cmpe_se/start-{number}/asks-{other}"
                if store.check([asked]):
                    store.set(f"cmpe_se/start-{number}/answers-{store.get(asked).decode()}", "yes")
                    waiting.remove(other)
            _wait(end, f"process(es) {', '.join(map(str, sorted(waiting)))}" if waiting else "")
        return number
    word = uuid.uuid4().hex
    while True:
        if store.check(["cmpe_se/newest"]):
            number = int(store.get("cmpe_se/newest"))
            store.set(f"cmpe_se/start-{number}/asks-{rank}", word)
            if store.check([f"cmpe_se/start-{number}/answers-{word}"]):
                return number
        _wait(end, "the main process")


def _wait(end: float, who: str) -> None:
    if who and time.monotonic() > end:
        raise UserError(f"{who} of this run did not start in time; look at the logs of the other machines")
    time.sleep(_LOOK if who else 0)
