"""Many epochs: the memory of the process and its workers stays what it was, and no process is left."""

import multiprocessing
import os
import signal

import psutil
import pytest
import torch
from PIL import Image

from cmpe_se.data import Augmentation, load_data
from tests.data.greys import encoded
from tests.photos import write_photos

AUGMENTATION = Augmentation(flip=True, random_erasing=0.5)
EPOCHS, MEGABYTE = 6, 2**20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs of two classes, 16 of them of 800x600: 1.4 MB each as they are decoded, and as floats 6 MB."""
    root = write_photos(tmp_path_factory.mktemp("memory") / "images")
    with Image.open(root / "train" / "china" / "landscape.png") as photo:
        content = encoded(photo.resize((800, 600)), "jpeg")
    for index in range(16):
        (root / "train" / "china" / f"large-{index:02d}.jpg").write_bytes(content)
    return root


def memory(data, epoch):
    """Bytes of this process alone after an epoch of training and test, and the most that a worker had on the way."""
    workers = 0
    for batches in (
        data.train_batches(epoch, batch_size=8, seed=0, augmentation=AUGMENTATION),
        data.test_batches(batch_size=8),
    ):
        for index, _ in enumerate(batches):
            if index == 1:  # workers end as they have nothing more to do
                workers = max([workers, *(_own(worker.pid) for worker in multiprocessing.active_children())])
    return _own(os.getpid()), workers


def _own(pid):
    try:
        return psutil.Process(pid).memory_full_info().uss
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0


@pytest.mark.long
def test_memory_is_flat_over_epochs(images):
    data = load_data("folder", images, image_size=112, workers=2)
    sizes = [memory(data, epoch) for epoch in range(EPOCHS)]
    (own, worker), (own_later, worker_later) = (
        [max(numbers) for numbers in zip(*part, strict=True)] for part in (sizes[1:3], sizes[-2:])
    )
    # Two epochs more decode 60 MB of pixels and hand over 8 MB of batches, which are 30 MB of floats. Neither stays.
    assert own_later - own < 4 * MEGABYTE
    assert worker_later - worker < 12 * MEGABYTE
    assert multiprocessing.active_children() == []


def test_an_epoch_that_is_left_early_leaves_no_process(images):
    data = load_data("folder", images, image_size=112, workers=2)
    for _ in range(3):
        batches = data.train_batches(0, batch_size=4, seed=0, augmentation=AUGMENTATION)
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        del batches
        assert multiprocessing.active_children() == []


def test_the_epoch_after_a_killed_worker_is_whole(images):
    data = load_data("folder", images, image_size=112, workers=2)
    settings = {"batch_size": 4, "seed": 0, "augmentation": AUGMENTATION}
    expected = list(data.train_batches(1, **settings))
    batches = data.train_batches(0, **settings)
    next(batches)
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # noqa: PT012  # any line may raise it
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        list(batches)
    del batches
    again = list(data.train_batches(1, **settings))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(expected, again, strict=True))
    assert multiprocessing.active_children() == []
