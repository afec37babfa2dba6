import pytest
import torch
from PIL import Image

from cmpe_se.data import (
    DataOptions,
    LargeImages,
    SmallImages,
    decoding,
    load_data,
    readers,
)
from cmpe_se.data import shards as shards_module
from cmpe_se.data.readers import _with_parquet
from cmpe_se.errors import UserError
from tests.data.greys import PLAIN, encoded, grey, index_of, network


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """hugging_face({"train": labels, ...}) writes parquet files and returns the folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()

    def make(splits, *, image="image", label="label", names=("cat", "dog"), more=(), images=(), name="parquet"):
        feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
        others = {column: datasets.Image() for column in images}
        features = datasets.Features({image: datasets.Image(), label: feature, **dict(more), **others})
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for split, labels in splits.items():
            rows = {image: [{"bytes": encoded(grey(index)), "path": None} for index in range(len(labels))]}
            rows |= {label: labels} | {name: [1] * len(labels) for name, _ in more}
            for column in images:
                pixels = [{"bytes": encoded(grey(30 + index)), "path": None} for index in range(len(labels))]
                rows[column] = pixels
            part = datasets.Dataset.from_dict(rows, features=features)
            part.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        return folder

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_parquet(workers, hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1, 1, 0, 1, 0, 0], "test": [1, 0, 1]})
    data = load_data(f"hfds/{folder}", tmp_path / "kept", image_size=112, workers=workers)
    assert isinstance(data, LargeImages)
    assert (data.classes, data.train_size, data.test_size) == (("cat", "dog"), 7, 3)
    assert (tmp_path / "kept").is_dir()
    images, labels = next(data.test_batches(batch_size=10))
    assert labels.tolist() == [1, 0, 1]
    assert index_of(images) == [0, 1, 2]
    images, labels = next(data.train_batches(0, batch_size=7, seed=0, augmentation=PLAIN))
    assert sorted(zip(index_of(images), labels.tolist(), strict=True)) == list(enumerate([0, 1, 1, 0, 1, 0, 0]))
    assert data.test_image(2).getpixel((0, 0)) == (8, 8, 8)


@pytest.mark.parametrize("below", [False, True])
def test_parquet_files_in_data_dir_need_no_hub(below, hugging_face, tmp_path):
    files = hugging_face({"train": [0, 1, 1], "test": [1, 0]}, name="clone/data" if below else "clone")
    data = load_data("hfds/owner/pets", files.parent if below else files, image_size=112, workers=0)
    assert (data.name, data.classes, data.train_size) == ("hfds/owner/pets", ("cat", "dog"), 3)
    assert next(data.test_batches(batch_size=2))[1].tolist() == [1, 0]
    assert sorted(path.suffix for path in files.iterdir()) == [".parquet"] * 2  # no copy among them


def test_parquet_files_of_another_data_set_are_not_taken(hugging_face, tmp_path):
    """A folder that keeps several data sets: only the one that is named so."""
    food = hugging_face({"train": [0, 1], "test": [1, 0]}, name="data/food")
    assert _with_parquet(food.parent, "cifar100") is None
    assert _with_parquet(food.parent, "owner/food") == food
    assert _with_parquet(food, "cifar100") == food
    assert _with_parquet(tmp_path / "nowhere", "food") is None


def test_small_images_are_held_in_memory(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "grey", lambda index: Image.new("RGB", (20, 24), (index * 4,) * 3))
    folder = hugging_face({"train": [0, 1, 1, 0, 1], "test": [1, 0, 1]})
    data = load_data(f"hfds/{folder}", tmp_path / "kept", workers=0)
    assert isinstance(data, SmallImages)
    assert (data.classes, data.train_size, data.test_size, data.image_size) == (("cat", "dog"), 5, 3, (24, 20))
    images, labels = next(data.test_batches(batch_size=3))
    greys = images[:, 0, 5, 5] * data.std[0] + data.mean[0]
    assert (greys * 255).round().int().tolist() == [0, 4, 8]
    assert labels.tolist() == [1, 0, 1]
    monkeypatch.setattr(decoding, "_Chunks", None)  # the second time it comes from the cache
    again = load_data(f"hfds/{folder}", tmp_path / "kept", workers=0)
    assert torch.equal(next(again.test_batches(batch_size=3))[0], images)


def test_other_columns_and_no_names(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 2, 1], "validation": [1, 0], "test": [-1]}, image="img", names=())
    data = load_data(f"hfds/{folder}", tmp_path / "kept", workers=0)
    assert (data.classes, data.test_size, data.image_size) == (("0", "1", "2"), 2, (224, 224))


def test_a_test_part_with_labels_comes_first(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1], "validation": [1, 0], "test": [1, 0, 1]})
    assert load_data(f"hfds/{folder}", tmp_path / "kept", workers=0).test_size == 3


def test_label_column_by_its_type(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1], "test": [1]}, label="fine_label")
    assert load_data(f"hfds/{folder}", tmp_path / "kept", workers=0).classes == ("cat", "dog")


def test_image_folder(make_folder, tmp_path, hugging_face):
    root = make_folder({"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 1})
    data = load_data(f"hfds/{root}", tmp_path / "kept", workers=0)
    assert (data.classes, data.train_size, data.test_size) == (("cat", "dog"), 5, 2)
    assert data.test_image(1).tobytes() == Image.open(root / "test" / "dog" / "000.png").tobytes()
    path = root / "test" / "dog" / "000.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"dog/000\.png is truncated or corrupt"):
        list(load_data(f"hfds/{root}", tmp_path / "kept again", workers=0).test_batches(batch_size=2))


def test_broken_image_in_parquet(hugging_face, tmp_path, monkeypatch):
    whole = encoded
    monkeypatch.setitem(globals(), "encoded", lambda image: whole(image)[:60])
    data = load_data(f"hfds/{hugging_face({'train': [0, 1], 'test': [1, 0]})}", tmp_path / "kept", workers=1)
    with pytest.raises(UserError, match=r"^image 0 of the split test of hfds/.* is truncated or corrupt"):
        list(data.test_batches(batch_size=2))


@pytest.mark.parametrize("image_size", [32, 112])  # held in memory, and not
def test_a_broken_image_in_parquet_is_passed_over(image_size, hugging_face, tmp_path, monkeypatch):
    whole = encoded
    monkeypatch.setitem(globals(), "encoded", lambda image: whole(image)[: 60 if image.getpixel((0, 0))[0] else None])
    name = f"hfds/{hugging_face({'train': [0, 1], 'test': [1, 0]})}"
    data = load_data(name, tmp_path / "kept", image_size=image_size, workers=0, skip_unreadable=True)
    assert [labels.tolist() for _, labels in data.test_batches(batch_size=2)] == [[1]]
    assert [image.image for image in data.unreadable] == [f"image 1 of the split test of {name}"]


WRONG_HUGGING_FACE = {
    "no test split": (({"train": [0, 1]},), {}, "has the splits train; expected train and one of test, val"),
    "negative labels": (({"train": [0, -1], "test": [0]},), {"names": ()}, "column label has to hold class indices"),
    "only a test part without labels": (({"train": [0, 1], "test": [-1]},), {"names": ()}, "column label has to hold"),
    "no labels": (({"train": [0, 1], "test": [0]},), {"names": (), "label": "age"}, "has the columns image, age;"),
}


@pytest.mark.parametrize("case", WRONG_HUGGING_FACE)
def test_wrong_hugging_face(case, hugging_face, tmp_path):
    arguments, options, message = WRONG_HUGGING_FACE[case]
    with pytest.raises(UserError, match=message):
        load_data(f"hfds/{hugging_face(*arguments, **options)}", tmp_path / "kept")


def coarse(names=("animal", "plant")):
    """A second column of classes, all 1."""
    import datasets

    return [("coarse", datasets.ClassLabel(names=list(names)))]


def test_named_columns(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1, 0], "test": [1, 0]}, label="fine", more=coarse(), images=["mask"])
    expected = {
        ("image", "fine"): (("cat", "dog"), [1, 0], [0, 1]),
        ("image", "coarse"): (("animal", "plant"), [1, 1], [0, 1]),
        ("mask", "fine"): (("cat", "dog"), [1, 0], [30, 31]),
    }
    for (image, label), (classes, labels, greys) in expected.items():
        for size in (None, 32):  # 32: held in memory, under a key of the cache of its own
            options = DataOptions(image_column=image, label_column=label)
            data = load_data(f"hfds/{folder}", tmp_path / "kept", options=options, image_size=size, workers=0)
            images, found = next(data.test_batches(batch_size=2))
            assert (data.classes, found.tolist()) == (classes, labels)
            first = (images[:, 0, 5, 5] * data.std[0] + data.mean[0]) * 255 / 4
            assert first.round().int().tolist() == greys


COLUMNS = {
    "two of images": (
        {},
        "choose the one of images among image, mask by --image-column",
    ),
    "two of labels": ({"image_column": "image"}, "choose the one of labels among fine, coarse by --label-column"),
    "no such column": (
        {"image_column": "x"},
        "--image-column x is none of its columns image, .*; choose one of",
    ),
    "no images": ({"image_column": "fine"}, "--image-column fine holds no images; choose one of image, mask"),
    "no labels": (
        {"image_column": "mask", "label_column": "image"},
        "image holds no labels; choose one of fine",
    ),
}


def test_columns_are_chosen_from_the_error(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1], "test": [1]}, label="fine", more=coarse(), images=["mask"])
    for options, message in COLUMNS.values():
        with pytest.raises(UserError, match=message):
            load_data(f"hfds/{folder}", tmp_path / "kept", options=DataOptions(**options))


SPLITS = {
    "only one": (
        {},
        "the splits train; .* by --train-split and --test-split or slices of one, .*'train\\[:80%\\]'",
    ),
    "no such split": ({"train_split": "train", "test_split": "dev"}, "no test split dev; choose one of train"),
    "twice the same": ({"train_split": "train", "test_split": "train"}, "cannot be both the train split and the test"),
    "shared images": (
        {"train_split": "train[:80%]", "test_split": "train[60%:]"},
        r"train\[:80%\] and train\[60%:\] share 2 images",
    ),
}


def test_slices_of_one_split(hugging_face, tmp_path, caplog):
    folder = hugging_face({"train": [0, 1, 1, 0, 0, 0, 0, 0, 0, 1]})
    for options, message in SPLITS.values():
        with pytest.raises(UserError, match=message):
            load_data(f"hfds/{folder}", tmp_path / "kept", options=DataOptions(**options))
    named = DataOptions(train_split="train[:80%]", test_split="train[80%:]")
    data = load_data(f"hfds/{folder}", tmp_path / "kept", options=named, workers=0)
    assert (data.train_size, data.test_size) == (8, 2)
    images, labels = next(data.test_batches(batch_size=2))
    assert (index_of(images), labels.tolist()) == ([8, 9], [0, 1])
    unseen = DataOptions(train_split="train[3:9]", test_split="train[9:]")
    load_data(f"hfds/{folder}", tmp_path / "kept", options=unseen, workers=0)
    assert "has no images of 1 classes of train[9:], such as dog" in caplog.text


def test_a_hold_out_of_one_split_is_tested_whole_by_name(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1, 1]})
    of = {"preprocessing": network("bird", "dog", "cat"), "hold_out": True, "workers": 0}
    data = load_data(f"hfds/{folder}", tmp_path / "kept", **of)
    assert (data.classes, data.test_size, data.tested) == (
        ("bird", "dog", "cat"),
        3,
        f"the split train of hfds/{folder}",
    )
    assert next(data.test_batches(batch_size=3))[1].tolist() == [2, 1, 1]
    with pytest.raises(UserError, match="has images of dog, and the network was trained on 2 other classes"):
        load_data(f"hfds/{folder}", tmp_path / "kept", **of | {"preprocessing": network("bird", "cat")})
    with pytest.raises(UserError, match="hold_out data are those of a trained network"):
        load_data(f"hfds/{folder}", tmp_path / "kept", hold_out=True)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_columns_are_for_those_data_sets_that_have_them(name):
    with pytest.raises(UserError, match=f"label_column is x, which is for hfds and not for {name}"):
        load_data(name, options=DataOptions(label_column="x"))


def test_saved_to_disk(hugging_face, tmp_path):
    import datasets

    parts = datasets.load_dataset(
        str(hugging_face({"train": [0, 1, 0], "test": [1, 0]})), cache_dir=str(tmp_path / "hf")
    )
    parts.save_to_disk(tmp_path / "saved")
    data = load_data(f"hfds/{tmp_path / 'saved'}", tmp_path / "kept", workers=0)
    assert (data.classes, data.train_size, data.test_size) == (("cat", "dog"), 3, 2)
    assert next(data.test_batches(batch_size=2))[1].tolist() == [1, 0]


def test_the_copy_of_datasets_stays_out_of_the_images(hugging_face, tmp_path):
    folder = hugging_face({"train": [0, 1], "test": [0]})
    for data_dir in (tmp_path, folder, folder / "below"):
        with pytest.raises(UserError, match="data_dir is where datasets puts its own copy"):
            load_data(f"hfds/{folder}", data_dir)


def test_nothing_for_hugging_face(tmp_path, hugging_face):
    with pytest.raises(
        UserError, match=r"datasets cannot load .*; give a name on the hub, or a folder of parquet"
    ) as caught:
        load_data(f"hfds/{tmp_path / 'nowhere'}", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package", "module"), [("hfds/x", "datasets", readers), ("wds/x", "webdataset", shards_module)]
)
def test_missing_package(name, package, module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{name} needs the package {package}: pip install 'cmpe-se\["):
        load_data(name, tmp_path)
