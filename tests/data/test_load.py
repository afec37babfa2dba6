import pytest
import torch

from cmpe_se.data import Augmentation, LargeImages, SmallImages, load, load_data
from cmpe_se.data.load import DATA_SETS
from cmpe_se.errors import UserError

# Size of the images, image_size, what comes out and its size.
CHOICES = {
    "one small size": ((32, 32), None, SmallImages, (32, 32)),
    "small, not square": ((96, 40), None, SmallImages, (40, 96)),
    "small, scaled": ((200, 150), 64, SmallImages, (64, 64)),
    "small, scaled up": ((10, 10), 96, SmallImages, (96, 96)),
    "large": ((97, 40), None, LargeImages, (224, 224)),
    "large, size given": ((200, 150), 97, LargeImages, (97, 97)),
}


@pytest.mark.parametrize("case", CHOICES)
def test_small_or_large(case, make_folder):
    size, image_size, kind, expected = CHOICES[case]
    root = make_folder({f"{part}/{name}": 2 for part in ("train", "test") for name in "ab"}, size=size)
    data = load_data("folder", root, image_size=image_size, workers=0)
    assert type(data) is kind
    assert data.image_size == expected
    assert (data.train_size, data.test_size, data.classes) == (4, 4, ("a", "b"))


def test_mixed_sizes_are_large(make_folder):
    make_folder({"train/a": 2, "train/b": 2, "test/a": 2, "test/b": 2}, size=(32, 32))
    root = make_folder({"train/a": 1}, size=(32, 33))
    assert isinstance(load_data("folder", root), LargeImages)


def test_too_many_for_memory_are_large(make_folder, monkeypatch):
    root = make_folder({"train/a": 2, "train/b": 2, "test/a": 2, "test/b": 2})
    monkeypatch.setattr(load, "_SMALL_BYTES", 8 * 3 * 32 * 32 - 1)
    assert isinstance(load_data("folder", root), LargeImages)


def test_unsplit_folder_gives_the_same_split_again(make_folder, caplog):
    root = make_folder({"a": 10, "b": 15})
    first, again = load_data("folder", root), load_data("folder", str(root))
    assert (first.train_size, first.test_size) == (20, 5)
    assert torch.equal(first._host.test_images, again._host.test_images)
    assert "fixed fifth" in caplog.text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar", r"did you mean cifar10\?"),
        ("fashion-mnist", r"did you mean fashion_mnist\?"),
        ("xyzzy", "; there are"),
    ],
)
def test_unknown_name(name, hint):
    with pytest.raises(UserError, match=hint) as caught:
        load_data(name)
    assert f"there are {', '.join(DATA_SETS)}" in str(caught.value)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_data_dir(name, tmp_path):
    with pytest.raises(UserError, match=f"^{name} needs data_dir"):
        load_data(name)
    with pytest.raises(UserError, match="nowhere does not exist; give the folder"):
        load_data(name, tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; give the folder"):
        load_data(name, tmp_path / "file")


def test_sizes_of_training_and_test(make_folder):
    """Cropped at another size for tests, images are decoded one by one, however small."""
    root = make_folder({"train/a": 3, "train/b": 3, "test/a": 2, "test/b": 2}, size=(40, 30))
    data = load_data("folder", root, image_size=24, test_image_size=32, test_crop=0.8, workers=0)
    assert isinstance(data, LargeImages)
    assert (data.train_image_size, data.image_size, data.preprocessing.crop) == ((24, 24), (32, 32), 0.8)
    images, _ = next(data.train_batches(0, batch_size=4, seed=0, augmentation=Augmentation()))
    assert images.shape == (4, 3, 24, 24)
    tested, _ = next(data.test_batches(batch_size=4))
    assert tested.shape == (4, 3, 32, 32)
    # As a run is loaded again; and the parts of a validation split.
    again = load_data("folder", root, image_size=24, in_memory=False, preprocessing=data.preprocessing, workers=0)
    for other in (again, *data.held_out(torch.tensor([1, 4]))):
        assert (other.train_image_size, other.image_size) == ((24, 24), (32, 32))
    assert load_data("folder", root, preprocessing=data.preprocessing).train_image_size == (32, 32)
    assert isinstance(load_data("folder", root, image_size=24, test_crop=0.9), LargeImages)
    with pytest.raises(UserError, match=r"test_crop is 0\.9, but preprocessing has its own"):
        load_data("folder", root, preprocessing=data.preprocessing, test_crop=0.9)
    with pytest.raises(UserError, match="test_image_size is 0: give a number of pixels"):
        load_data("folder", root, image_size=24, test_image_size=0)
    with pytest.raises(UserError, match=r"test_crop is 0\.9, but the images of cifar10 are tested as they are"):
        load_data("cifar10", root, test_crop=0.9)


def test_image_size_and_workers(two_classes):
    with pytest.raises(UserError, match="image_size is 32, but digits has 8 pixels a side; leave image_size out"):
        load_data("digits", image_size=32)
    assert load_data("digits", image_size=8).image_size == (8, 8)
    with pytest.raises(UserError, match="image_size is 0"):
        load_data("folder", two_classes, image_size=0)
    with pytest.raises(UserError, match="workers is -1"):
        load_data("folder", two_classes, workers=-1)
