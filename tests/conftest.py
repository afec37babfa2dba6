"""Trained runs that several folders of tests look into; nobody changes them."""

import logging
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.training.processes import SHARED_FOLDER, SHORT, trained_run

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config):
    # Threads of a process that is started with several wait for each other without taking a core from other tests.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if SHARED_FOLDER not in os.environ:  # in the process that starts the workers, or in the only one
        os.environ[SHARED_FOLDER] = tempfile.mkdtemp(prefix="cmpe-se-runs-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(SHARED_FOLDER), ignore_errors=True))
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)  # each worker has one core


@pytest.hookimpl(tryfirst=True)  # while the slow tests are there, in each tier
def pytest_collection_modifyitems(items):
    """Files with slow tests first: a worker takes the next file when it has done one, and the last ones are short."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A worker cannot send its reports with names of files that are no UTF-8, which some tests log on purpose."""
    report = yield
    report.sections = [(name, _sendable(text)) for name, text in report.sections]
    if report.longrepr and (shown := str(report.longrepr)) != _sendable(shown):
        report.longrepr = _sendable(shown)
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


_KEPT_FOR_GOOD = (
    "PYTEST_",
    "KMP_",
    "TORCH",
    "_TORCH",
    "TRITON_",
    "CUBLAS_",
    "KINETO_",
    "WANDB_",
    "MLFLOW_",
    "HF_",
    "RAY_",
)
"""What pytest, and libraries or we for them, set in the environment of a process that uses them, for its whole life."""


def _of_the_process() -> dict[str, object]:
    """What belongs to the process and not to a test, where a later test, perhaps of another file, would find it."""
    import torch

    from cmpe_se.utils.signals import STOP_SIGNALS

    ours = logging.getLogger("cmpe_se")
    environment = {f"${k}": v for k, v in os.environ.items() if not k.startswith(_KEPT_FOR_GOOD)}
    return environment | {
        "working directory": os.getcwd(),
        "level of the root logger": logging.root.level,
        "cmpe_se's logger": (ours.level, ours.propagate, ours.disabled, tuple(ours.handlers)),
        "logging.disable": logging.root.manager.disable,
        "handlers of stop signals": tuple(map(signal.getsignal, STOP_SIGNALS)),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "TF32 of matrix products": torch.backends.cuda.matmul.allow_tf32,
        "TF32 of convolutions": torch.backends.cudnn.allow_tf32,
        "cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was():
    """Tests run in an order that changes with the number of workers: what one leaves behind fails there, not later."""
    before = _of_the_process()
    yield
    after = _of_the_process()
    changed = {k: (before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)}
    assert not changed, f"left changed for the tests after this one (before, after): {changed}"


@pytest.fixture(scope="session")
def folded() -> Path:
    """Our network with folded_3x3, after three epochs: it has learnt something, and makes mistakes."""
    return trained_run("--epochs=3")


@pytest.fixture(scope="session")
def se() -> Path:
    """SE, which has no picture, after an epoch."""
    return trained_run("--epochs=1", "--model=se_preact_resnet20")


@pytest.fixture(scope="session")
def static() -> Path:
    """Constant gates, after an epoch."""
    return trained_run("--epochs=1", "--model=preact_resnet20", "--view=static")


@pytest.fixture(scope="session")
def cbam() -> Path:
    """Gates of a module of their own, which differ from position to position and go up to 4, after an epoch."""
    settings = ("--start=one", "--reduction=4", "--min-hidden=6")
    return trained_run("--epochs=1", "--model=preact_resnet20", "--view=timm_cbam", *settings)


@pytest.fixture(scope="session")
def plain() -> Path:
    """No attention at all, after an epoch."""
    return trained_run("--epochs=1", "--model=preact_resnet20")


@pytest.fixture(scope="session")
def converted() -> Path:
    """A converted network of timm's with bottlenecks, whose gates go up to 2, after an epoch."""
    return trained_run("--epochs=1", "--model=test_resnet", "--convert=pair_view_1x1")


@pytest.fixture(scope="session")
def short_run() -> Path:
    """Two epochs of digits on one thread, never interrupted."""
    return trained_run(*SHORT)


@pytest.fixture(scope="session")
def cifar10_subset(tmp_path_factory):
    archive = SHARED / "cifar10-png-subset.tar.xz"
    if not archive.exists():
        pytest.skip(f"no real CIFAR-10 images: {archive} is not there")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run(["tar", "xf", archive, "-C", root], check=True)
    return root / "cifar10-png-subset"
