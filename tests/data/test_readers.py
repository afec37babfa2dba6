import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmpe_se.data import Augmentation, LargeImages, SmallImages, StreamedImages, decoding, load_data, readers
from cmpe_se.data import shards as shards_module
from cmpe_se.errors import UserError

PLAIN = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def _grey(index, side=120):
    """The image with the number ``index``: all of one grey, so that it can be told from the others."""
    return Image.new("RGB", (side, side), (index * 4,) * 3)


def _index_of(images):
    """Which numbers a batch of unchanged images holds."""
    return (((images[:, 0, 5, 5] * 0.229 + 0.485) * 255).round() / 4).int().tolist()


def _encoded(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


# --- Hugging Face data sets


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """hugging_face({"train": labels, ...}) writes parquet files and returns the folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets.disable_progress_bars()

    def make(splits, *, image="image", label="label", names=("cat", "dog"), more=()):
        feature = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
        features = datasets.Features({image: datasets.Image(), label: feature, **dict(more)})
        folder = tmp_path / "parquet"
        folder.mkdir()
        for split, labels in splits.items():
            rows = {image: [{"bytes": _encoded(_grey(index)), "path": None} for index in range(len(labels))]}
            rows |= {label: labels} | {name: [0] * len(labels) for name, _ in more}
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
    assert _index_of(images) == [0, 1, 2]
    images, labels = next(data.train_batches(0, batch_size=7, seed=0, augmentation=PLAIN))
    assert sorted(zip(_index_of(images), labels.tolist(), strict=True)) == list(enumerate([0, 1, 1, 0, 1, 0, 0]))
    assert data.test_image(2).getpixel((0, 0)) == (8, 8, 8)


def test_small_images_are_held_in_memory(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "_grey", lambda index: Image.new("RGB", (20, 24), (index * 4,) * 3))
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
    encoded = _encoded
    monkeypatch.setitem(globals(), "_encoded", lambda image: encoded(image)[:60])
    data = load_data(f"hfds/{hugging_face({'train': [0, 1], 'test': [1, 0]})}", tmp_path / "kept", workers=1)
    with pytest.raises(UserError, match=r"^image 0 of the split test of hfds/.* is truncated or corrupt"):
        list(data.test_batches(batch_size=2))


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


# --- WebDataset shards


@pytest.fixture
def shards(tmp_path):
    """shards(train=(5, 4), validation=(3,)) writes shards of so many images, which are numbered over each split."""
    pytest.importorskip("webdataset")

    def make(info=None, **splits):
        described = {}
        for split, lengths in splits.items():
            names, first = [], 0
            for number, length in enumerate(lengths):
                names.append(f"{split}-{number:04d}.tar")
                with tarfile.open(tmp_path / names[-1], "w") as tar:
                    for index in range(first, first + length):
                        _add(tar, f"{index:05d}.png", _encoded(_grey(index)))
                        _add(tar, f"{index:05d}.cls", str(index % 3).encode())
                first += length
            described[split] = {
                "name": split,
                "num_samples": sum(lengths),
                "filenames": names,
                "shard_lengths": list(lengths),
            }
        (tmp_path / "_info.json").write_text(json.dumps({"splits": described} | (info or {})))
        return tmp_path

    return make


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _stream(root, workers=0):
    return load_data("wds/x", root, image_size=32, workers=workers)


def test_shards(shards):
    data = _stream(shards(train=(5, 4), validation=(3, 1)))
    assert isinstance(data, StreamedImages)
    assert (data.classes, data.train_size, data.test_size) == (("0", "1", "2"), 9, 4)
    assert (data.image_size, data.in_chans) == ((32, 32), 3)
    assert data.test_image(3).getpixel((0, 0)) == (12, 12, 12)
    labels = torch.cat([labels for _, labels in data.test_batches(batch_size=4)]).tolist()
    assert [label for _, label in data.test_examples([1, 3])] == [labels[1], labels[3]]
    assert list(data.test_examples([])) == []
    named = _stream(shards({"classes": ["a", "b", "c"]}, train=(5, 4), test=(3, 1)))
    assert named.classes == ("a", "b", "c")


def test_shards_have_no_order_for_corruptions(shards):
    with pytest.raises(UserError, match="unpack them into class folders"):
        _stream(shards(train=(5,), val=(3,))).test_pixels(batch_size=2)


def test_folder_in_the_name(shards):
    assert load_data(f"wds/{shards(train=(5,), val=(3,))}", workers=0).train_size == 5


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_each_test_image_comes_once(workers, world, shards):
    data = _stream(shards(train=(5,), validation=(3, 5, 2, 4)), workers)
    seen = []
    for rank in range(world):
        for images, labels in data.test_batches(batch_size=4, rank=rank, world=world):
            indices = _index_of(images)
            assert labels.tolist() == [index % 3 for index in indices]
            seen += indices
    assert sorted(seen) == list(range(14))


def test_more_processes_than_test_shards(shards):
    data = _stream(shards(train=(5,), validation=(3, 1)))
    counts = [sum(len(labels) for _, labels in data.test_batches(batch_size=6, rank=r, world=3)) for r in range(3)]
    assert counts == [3, 1, 0]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_is_repeatable_and_resumes(workers, shards):
    data = _stream(shards(train=(6, 6, 6, 6), validation=(3,)), workers)
    augmentation = Augmentation(flip=True, color_jitter=0.4)

    def train(epoch=1, **options):
        return list(data.train_batches(epoch, batch_size=5, seed=3, augmentation=augmentation, **options))

    first = train()
    assert len(first) == data.steps_per_epoch(5) == 4
    state = torch.get_rng_state()
    for again, expected in ((train(), first), (train(start=2), first[2:])):
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(again, expected, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(train(epoch=2)[0][0], first[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_one_process_and_worker_train_on_each_image_at_most_once(workers, shards):
    data = _stream(shards(train=(6, 3, 5), validation=(3,)), workers)
    orders = []
    for epoch in range(2):
        batches = data.train_batches(epoch, batch_size=4, seed=0, augmentation=PLAIN)
        orders.append([index for images, _ in batches for index in _index_of(images)])
        assert len(orders[-1]) == len(set(orders[-1])) == 12
    assert orders[0] != orders[1]
    ((images, _),) = data.train_batches(0, batch_size=100, seed=0, augmentation=PLAIN)
    assert sorted(_index_of(images)) == list(range(14))


def test_ranks_train_on_different_shards(shards):
    data = _stream(shards(train=(6, 6), validation=(3,)))
    seen = [
        {
            i
            for x, _ in data.train_batches(0, batch_size=6, seed=0, augmentation=PLAIN, rank=r, world=2)
            for i in _index_of(x)
        }
        for r in range(2)
    ]
    assert seen[0] | seen[1] == set(range(12))
    assert not seen[0] & seen[1]
    with pytest.raises(UserError, match="3 processes need as many training shards, and there are 2"):
        next(data.train_batches(0, batch_size=6, seed=0, augmentation=PLAIN, rank=0, world=3))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_missed_at_the_end_of_the_test(workers, shards):
    root = shards(train=(5,), validation=(3,))
    with tarfile.open(root / "validation-0000.tar", "a") as tar:
        _add(tar, "00003.png", _encoded(_grey(3))[:60])
        _add(tar, "00003.cls", b"0")
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["validation"] |= {"num_samples": 4, "shard_lengths": [4]}
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"3 test images could be read where _info.json in .* says 4"):
        list(_stream(root, workers).test_batches(batch_size=2))


def test_odd_modes_in_shards(shards):
    root = shards(train=(2,), validation=(1,))
    with tarfile.open(root / "validation-0000.tar", "w") as tar:
        _add(tar, "0.png", _encoded(Image.fromarray(np.full((40, 40), 65535, np.uint16))))
        _add(tar, "0.cls", b"1")
    assert _stream(root).test_image(0).getpixel((0, 0)) == (255, 255, 255)
    images, _ = next(_stream(root).test_batches(batch_size=1))
    assert images.min() > 2


def test_wrong_shards(shards, tmp_path):
    with pytest.raises(UserError, match=r"has no _info\.json"):
        _stream(tmp_path)
    (tmp_path / "_info.json").write_text("{")
    with pytest.raises(UserError, match=r"_info\.json cannot be used"):
        _stream(tmp_path)
    (tmp_path / "_info.json").write_text('{"splits": {"train": {"filenames": []}, "val": {"filenames": []}}}')
    with pytest.raises(UserError, match="hold no labels"):
        _stream(tmp_path)
    with pytest.raises(UserError, match="has the splits train; expected train and one of"):
        _stream(shards(train=(2,)))
    root = shards(train=(2, 2), val=(2,))
    (root / "train-0001.tar").write_bytes(b"x" * 700)
    with pytest.raises(UserError, match=r"train-0001\.tar is no complete tar file"):
        _stream(root)
    (root / "train-0001.tar").unlink()
    with pytest.raises(UserError, match=r"names 1 shards that are not there, the first .*train-0001\.tar"):
        _stream(root)
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_data("wds/x", tmp_path / "nowhere")
