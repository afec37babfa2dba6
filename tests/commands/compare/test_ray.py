"""``compare --ray`` on a real local cluster: workers killed, Ctrl-C, runs that fail; and what machines lack."""

import importlib.util
import json
import re
import signal
import sys
import types
from pathlib import Path

import psutil
import pytest

from cmpe_se.commands.compare.ray_cluster import Needs, _machines_with_room, _versions, look_around
from cmpe_se.errors import UserError
from tests.commands.compare.test_compare import TWO, cells, few_digits, short, table
from tests.training.processes import complaint_of, empty_folder, run, start, succeed
from tests.training.runs import assert_same_tensors, weights

NETWORKS = "test_resnet,test_resnet:se,test_resnet:static"
FIRST, SECOND, BROKEN = (f"{name}-seed0" for name in ("test_resnet", "test_resnet-se", "test_resnet-static"))
# Ray's workers give way to all others, which on a busy machine is for ever.
AS_OTHERS = {"RAY_worker_niceness": "0"}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'cmpe-se[ray]'")


def epochs(path: Path) -> list[dict]:
    """The records of ``metrics.jsonl`` without its times."""
    lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").exists() else []
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


def worker_of(driver: int, cell: str) -> psutil.Process:
    """The Ray worker whose child trains a cell."""
    for process in psutil.Process(driver).children(recursive=True):
        if any(word.endswith(f"/{cell}") for word in process.cmdline()):
            return process.parent()
    raise AssertionError(f"nobody trains {cell}")


@pytest.mark.long
@needs_ray
def test_killed_workers_ctrl_c_and_failures_end_in_what_train_makes():
    folder = empty_folder() / "comparison"
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / BROKEN).write_text("in the way")
    command = [*short(NETWORKS, epochs=60), "--seeds=1", "--ray=local", "--output", folder]
    first = folder / "cells" / FIRST

    running = start(*command, env=AS_OTHERS)
    running.until(lambda: len(epochs(first)) > 1, timeout=240)
    worker_of(running.process.pid, FIRST).kill()
    log = Path(f"{first}.log")
    running.until(lambda: "resuming after step" in log.read_text(), timeout=240)
    stopped_after = int(re.search(r"stopped and saved after step (\d+)", log.read_text())[1])  # without its worker
    resumed_after = int(re.search(r"resuming after step (\d+) of 120", log.read_text())[1])
    assert 1 < stopped_after == resumed_after < 120
    done = running.send(signal.SIGINT, group=True)
    assert done.status == 130
    assert "of 3 runs finished; run the same command to continue" in done.complaint
    assert "a Ray cluster with" in done.err
    assert log.read_text().count("stopped and saved after step") == 2
    assert not (first / "result.json").exists()

    again = run(*command, env=AS_OTHERS)
    assert "test_resnet:static with seed 0 failed: " in again.complaint
    assert cells(folder) == [SECOND, FIRST]
    assert len(table(folder / "compare.csv")) == 2
    assert not list(folder.glob(".seen*"))
    alone = empty_folder() / "alone"
    succeed("train", "--recipe", folder / "recipe.yaml", "--model=test_resnet", "--seed=0", "--output", alone)
    assert epochs(first) == epochs(alone)
    assert_same_tensors(weights(first), weights(alone))


@needs_ray
def test_no_cluster_is_a_sentence():
    complaint = complaint_of(*short(TWO), "--seeds=1", "--ray=127.0.0.1:1", "--output", empty_folder() / "comparison")
    assert "no Ray cluster at '127.0.0.1:1'" in complaint


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    complaint = complaint_of(*short(TWO), "--seeds=1", "--ray", "--output", empty_folder() / "comparison")
    assert complaint.endswith("--ray needs ray; pip install 'cmpe-se[ray]'")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ray-cpus=2"], "ray_cpus is for runs on a Ray cluster; add --ray"),
        (["--ray-gpus=0"], "ray_gpus is for runs on a Ray cluster; add --ray"),
        (["--ray=false", "--ray-cpus=2"], "add --ray"),
        (["--ray", "--ray-cpus=0"], "ray_cpus is 0, should be at least 1"),
        (["--ray", "--ray-gpus=1.5"], "ray_gpus is 1.5, should be a part of one GPU, such as 0.5, or a whole number"),
        (["--ray", "--ray-gpus=-1"], "ray_gpus is -1.0, should be"),
    ],
)
def test_shares_that_cannot_be(flags, said):
    assert said in complaint_of(*short(TWO), *flags, "--output", empty_folder() / "comparison")


def machine(name: str, *, alive: bool = True, **resources: float) -> dict:
    """As ``ray.nodes()`` has it."""
    address = {"NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1"}
    return {"NodeID": f"id-{name}", "Alive": alive, "Resources": resources, **address}


def test_runs_go_to_machines_with_room_for_them():
    nodes = [machine("head", CPU=0.0), machine("a", CPU=4.0), machine("b", CPU=2.0, GPU=1.0)]
    cluster = types.SimpleNamespace(nodes=lambda: [*nodes, machine("gone", alive=False, CPU=64.0, GPU=8.0)])
    assert _machines_with_room(cluster, Needs(1, 0)) == {"id-a": "a (10.0.0.1)", "id-b": "b (10.0.0.1)"}
    assert list(_machines_with_room(cluster, Needs(1, 0.5))) == ["id-b"]
    with pytest.raises(UserError, match="no machine of the Ray cluster has 4 CPUs and 1 GPU for a run: the largest "):
        _machines_with_room(cluster, Needs(4, 1))


def test_a_machine_says_what_it_lacks(tmp_path):
    token = tmp_path / "token"
    assert "does not see what this one writes to" in look_around(str(token), [], _versions())
    token.touch()
    assert look_around(str(token), [str(few_digits())], _versions()) is None
    assert look_around(str(token), ["/nowhere/images"], _versions()).startswith("has no /nowhere/images; put it there")
    assert "and this one 0.1; install the same versions" in look_around(str(token), [], _versions() | {"torch": "0.1"})
