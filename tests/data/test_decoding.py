import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from cmpe_se.data import SmallImages, decoding, load_data
from cmpe_se.errors import UserError
from cmpe_se.utils.tensor_files import save_tensors


def _tensors(data):
    host = data._host
    return host.train_images, host.train_labels, host.test_images, host.test_labels


def _no_decoding(*_, **__):
    raise AssertionError("decoded")


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_and_labels(workers, two_classes, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 3)
    data = load_data("folder", two_classes, workers=workers)
    assert isinstance(data, SmallImages)
    train_images, train_labels, test_images, test_labels = _tensors(data)
    assert train_images.shape == (17, 3, 32, 32)
    assert train_labels.tolist() == [0] * 12 + [1] * 5
    assert test_labels.tolist() == [0] * 4 + [1] * 3
    for image, path in zip(test_images, sorted((two_classes / "test").rglob("*.png")), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_cache_is_used_and_gives_the_same(two_classes, cache_dir, monkeypatch):
    first = load_data("folder", two_classes)
    assert [path.suffix for path in cache_dir.iterdir()] == [".safetensors"]
    monkeypatch.setattr(decoding, "read_image", _no_decoding)
    again = load_data("folder", two_classes)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(again), strict=True))


@pytest.mark.slow
def test_cache_is_faster(cifar10_subset):
    times = []
    for _ in range(2):
        started = time.perf_counter()
        load_data("folder", cifar10_subset, workers=0)
        times.append(time.perf_counter() - started)
    assert times[1] < times[0] / 2


def test_cache_follows_the_files(two_classes, cache_dir):
    load_data("folder", two_classes)
    Image.new("RGB", (32, 32), "red").save(two_classes / "test" / "cat" / "000.png")
    data = load_data("folder", two_classes)
    assert data.test_image(0).getpixel((0, 0)) == (255, 0, 0)
    assert load_data("folder", two_classes, image_size=16).image_size == (16, 16)
    assert len(list(cache_dir.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"nonsense", "half", "a bit", "other tensors"])
def test_damaged_cache_is_ignored(damage, two_classes, cache_dir, caplog):
    first = load_data("folder", two_classes)
    (cache,) = cache_dir.iterdir()
    if damage == "half":
        damage = cache.read_bytes()[:-1000]
    elif damage == "a bit":
        damage = cache.read_bytes()[:-1] + bytes([cache.read_bytes()[-1] ^ 1])
    elif damage == "other tensors":
        save_tensors({"train": torch.zeros(1), "test": torch.zeros(1)}, cache)
        damage = cache.read_bytes()
    cache.write_bytes(damage)
    again = load_data("folder", two_classes)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(again), strict=True))
    assert "is not used" in caplog.text
    caplog.clear()
    load_data("folder", two_classes)
    assert not caplog.text


def test_unwritable_cache(two_classes, cache_dir, caplog):
    cache_dir.write_text("a file where the folder should be")
    assert load_data("folder", two_classes).train_size == 17
    assert "could not be cached" in caplog.text
    assert "CMPE_SE_CACHE" in caplog.text


def test_cache_place(two_classes, tmp_path, monkeypatch):
    monkeypatch.delenv("CMPE_SE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_data("folder", two_classes)
    assert len(list((tmp_path / "xdg" / "cmpe-se").iterdir())) == 1


def test_image_size_scales_and_crops_the_centre(make_folder):
    root = make_folder({"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1}, size=(60, 40))
    data = load_data("folder", root, image_size=16)
    image = Image.open(root / "test" / "a" / "000.png")
    expected = image.resize((16, 16), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    assert np.abs(np.asarray(data.test_image(0), int) - np.asarray(expected, int)).max() <= 1
    pixels = create_transform(16, is_training=False, interpolation="bicubic", crop_pct=1.0, normalize=False)(image)
    assert torch.equal(data._host.test_images[0], pixels)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_broken_file(workers, two_classes, cache_dir, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 4)
    path = two_classes / "train" / "cat" / "007.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="is truncated or corrupt") as caught:
        load_data("folder", two_classes, workers=workers)
    assert str(caught.value).startswith(str(path))
    assert not cache_dir.exists()


def test_several_broken_files(two_classes):
    for name in ("train/dog/003.png", "train/cat/002.png", "test/cat/001.png"):
        (two_classes / name).write_bytes(b"nothing")
    with pytest.raises(
        UserError, match=r"^3 of 24 images in .* cannot be used; the first: .*/train/cat/002\.png is not"
    ):
        load_data("folder", two_classes)


def test_another_size_than_the_peeked_ones(two_classes, monkeypatch):
    monkeypatch.setattr("cmpe_se.data.folders._PEEKED", 2)
    Image.new("RGB", (40, 32)).save(two_classes / "train" / "cat" / "001.png")
    with pytest.raises(UserError, match=r"001\.png is 40x32 pixels and others are 32x32: give an image_size"):
        load_data("folder", two_classes)
    assert load_data("folder", two_classes, image_size=32).train_size == 17


def test_progress_bar_after_a_second_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, seconds, shown in ((Terminal(), 2.0, True), (Terminal(), 0.0, False), (io.StringIO(), 2.0, False)):
        clock = iter([0.0, seconds, seconds, seconds])
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(decoding.time, "monotonic", lambda clock=clock: next(clock))
        assert list(decoding._with_progress(range(3), 3, "Decoding x")) == [0, 1, 2]
        monkeypatch.undo()
        assert ("Decoding x" in stream.getvalue()) == shown, stream.getvalue()
