import pickle
import struct

import numpy as np
import pytest
import scipy.io
import torch
from sklearn.datasets import load_digits as sklearn_digits
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from cmpe_se.data import Augmentation, SmallImages, load_data
from cmpe_se.errors import UserError


def test_digits():
    data = load_data("digits")
    assert isinstance(data, SmallImages)
    assert (data.name, data.in_chans, data.image_size) == ("digits", 1, (8, 8))
    assert (data.train_size, data.test_size, data.classes) == (1437, 360, tuple("0123456789"))
    host = data._host
    assert host.train_images.min() == 0
    assert host.train_images.max() == 255
    counts = [torch.bincount(labels) for labels in (host.train_labels, host.test_labels)]
    assert (counts[0].double() / 1437 - counts[1].double() / 360).abs().max() < 0.003
    # The parts together are all images of the original, each once.
    together = torch.cat([host.train_images, host.test_images]).reshape(1797, -1)
    original = torch.from_numpy(np.rint(sklearn_digits().data * 255 / 16)).to(torch.uint8)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, original.tolist()))


def test_digits_are_split_the_same_always():
    first, again = load_data("digits")._host, load_data("digits")._host
    assert torch.equal(first.test_images, again.test_images)
    # Other versions of scikit-learn must give this split too, or results on it would not compare.
    assert first.test_labels[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


def _random(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _pickled(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, calculate_md5(path)]


def make_cifar10(root, monkeypatch):
    folder, images = root / "cifar-10-batches-py", _random(25, 3072)
    names = [f"data_batch_{index}" for index in range(1, 6)]
    parts = [
        _pickled(folder / name, {"data": images[index * 4 : index * 4 + 4], "labels": [index, 1, 2, 3]})
        for index, name in enumerate(names)
    ]
    test = _pickled(folder / "test_batch", {"data": images[20:], "labels": [9, 8, 7, 6, 5]})
    meta = _pickled(folder / "batches.meta", {"label_names": [f"class {index}" for index in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", parts)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta[1]})
    labels = [0, 1, 2, 3, 1, 1, 2, 3, 2, 1, 2, 3, 3, 1, 2, 3, 4, 1, 2, 3, 9, 8, 7, 6, 5]
    return images.reshape(25, 3, 32, 32), labels, 20, tuple(f"class {index}" for index in range(10))


def make_cifar100(root, monkeypatch):
    folder, images = root / "cifar-100-python", _random(9, 3072)
    labels = [0, 99, 5, 17, 3, 50, 1, 2, 98]
    entries = [{"data": images[part], "fine_labels": labels[part]} for part in (slice(6), slice(6, 9))]
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [_pickled(folder / "train", entries[0])])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [_pickled(folder / "test", entries[1])])
    meta = _pickled(folder / "meta", {"fine_label_names": [f"fine {index}" for index in range(100)]})
    monkeypatch.setattr(datasets.CIFAR100, "meta", datasets.CIFAR100.meta | {"md5": meta[1]})
    return images.reshape(9, 3, 32, 32), labels, 6, tuple(f"fine {index}" for index in range(100))


def make_svhn_extra(root, monkeypatch):
    images, labels = _random(9, 3, 32, 32), np.array([10, 1, 2, 9, 5, 10, 3, 4, 10])
    split_list = dict(datasets.SVHN.split_list)
    for split, part in (("train", slice(4)), ("extra", slice(4, 6)), ("test", slice(6, 9))):
        file = root / f"{split}_32x32.mat"
        scipy.io.savemat(file, {"X": images[part].transpose(2, 3, 1, 0), "y": labels[part, None].astype(np.uint8)})
        split_list[split] = ["", file.name, calculate_md5(file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return images, (labels % 10).tolist(), 6, tuple("0123456789")


def make_svhn(root, monkeypatch):
    images, labels, _, classes = make_svhn_extra(root, monkeypatch)
    kept = [0, 1, 2, 3, 6, 7, 8]
    return images[kept], [labels[index] for index in kept], 4, classes


def make_fashion_mnist(root, monkeypatch):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images, labels = _random(9, 1, 28, 28), [0, 9, 5, 4, 3, 2, 1, 1, 8]
    for split, part in (("train", slice(6)), ("t10k", slice(6, 9))):
        count = len(labels[part])
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images[part].tobytes())
        header = struct.pack(">2i", 0x801, count)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(labels[part]))
    return images, labels, 6, tuple(datasets.FashionMNIST.classes)


MAKERS = {
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "svhn": make_svhn,
    "svhn_extra": make_svhn_extra,
    "fashion_mnist": make_fashion_mnist,
}


@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_formats(name, tmp_path, monkeypatch):
    images, labels, train_size, classes = MAKERS[name](tmp_path, monkeypatch)
    data = load_data(name, tmp_path)
    assert (data.name, data.classes, data.train_size) == (name, classes, train_size)
    assert (data.in_chans, data.image_size) == (images.shape[1], images.shape[2:])
    host = data._host
    assert np.array_equal(torch.cat([host.train_images, host.test_images]).numpy(), images)
    assert torch.cat([host.train_labels, host.test_labels]).tolist() == labels
    pixels = images[:train_size].astype(np.float64) / 255
    assert np.allclose(data.mean, pixels.mean((0, 2, 3)), atol=1e-12)
    assert np.allclose(data.std, pixels.std((0, 2, 3)), atol=1e-12)
    shown = np.asarray(data.test_image(0))
    assert np.array_equal(shown, images[train_size][0] if data.in_chans == 1 else images[train_size].transpose(1, 2, 0))
    ((batch, batch_labels),) = data.train_batches(0, batch_size=100, seed=0, augmentation=Augmentation())
    assert batch.shape == (train_size, *images.shape[1:])
    assert sorted(batch_labels.tolist()) == sorted(labels[:train_size])


@pytest.mark.parametrize("name", MAKERS)
def test_missing_files(name, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"^{name} is not in {folder}, .*expected {folder}/.*--download true"):
            load_data(name, folder)


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cifar10 is not in data,"):
        load_data("cifar10")


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_files(name, tmp_path, monkeypatch):
    MAKERS[name](tmp_path, monkeypatch)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{name} is not in .*, or incomplete"):
        load_data(name, tmp_path)


def test_failed_download(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(UserError, match=r"cifar10 could not be downloaded to .* \(no network\); put .* there by hand"):
        load_data("cifar10", tmp_path, download=True)


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; give the folder that holds"):
        load_data("svhn", tmp_path / "file")
