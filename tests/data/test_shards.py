"""WebDataset shards: what is read of them, and what is refused before training."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from cmpe_se.data import Augmentation, StreamedImages, load_data
from cmpe_se.errors import UserError
from tests.data.greys import PLAIN, encoded, grey, index_of, network


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
                        _add(tar, f"{index:05d}.png", encoded(grey(index)))
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
            indices = index_of(images)
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
    assert "the same to the bit with as many processes and --workers" in data.resume_note
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
        orders.append([index for images, _ in batches for index in index_of(images)])
        assert len(orders[-1]) == len(set(orders[-1])) == 12
    assert orders[0] != orders[1]
    ((images, _),) = data.train_batches(0, batch_size=100, seed=0, augmentation=PLAIN)
    assert sorted(index_of(images)) == list(range(14))


def test_ranks_train_on_different_shards(shards):
    data = _stream(shards(train=(6, 6), validation=(3,)))
    seen = [
        {
            i
            for x, _ in data.train_batches(0, batch_size=6, seed=0, augmentation=PLAIN, rank=r, world=2)
            for i in index_of(x)
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
        _add(tar, "00003.png", encoded(grey(3))[:60])
        _add(tar, "00003.cls", b"0")
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["validation"] |= {"num_samples": 4, "shard_lengths": [4]}
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"3 test images could be read where _info.json in .* says 4"):
        list(_stream(root, workers).test_batches(batch_size=2))
    data = load_data("wds/x", root, image_size=32, workers=workers, skip_unreadable=True)
    assert sum(len(labels) for _, labels in data.test_batches(batch_size=2)) == 3
    assert [image.image for image in data.unreadable] == [str(root)]
    assert "1 of 4 images in the shards cannot be read" in data.unreadable[0].reason


def write_shards(folder, members, info=None):
    """One shard of (name, content) for training, and the same for the test."""
    folder.mkdir()
    splits = {}
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for name, content in members:
                _add(tar, name, content)
        count = sum(name.endswith(".cls") and "._" not in name for name, _ in members)
        splits[split] = {"name": split, "num_samples": count, "filenames": [f"{split}.tar"], "shard_lengths": [count]}
    (folder / "_info.json").write_text(json.dumps({"splits": splits} | (info or {})))
    return folder


def samples(ending, start="", count=3):
    """Members of images and labels."""
    for index in range(count):
        yield f"{start}{index:05d}.{ending}", encoded(grey(index))
        yield f"{start}{index:05d}.cls", str(index % 2).encode()


@pytest.mark.parametrize("ending", ["jpeg", "JPG", "JPEG", "Png", "webp", "jfif", "bmp"])
def test_members_of_any_kind_and_case(ending, tmp_path):
    pytest.importorskip("webdataset")
    data = _stream(write_shards(tmp_path / "x", list(samples(ending))))
    images, labels = next(data.test_batches(batch_size=5))
    assert (index_of(images), labels.tolist()) == ([0, 1, 2], [0, 1, 0])
    batches = list(data.train_batches(0, batch_size=3, seed=0, augmentation=PLAIN))
    assert [sorted(index_of(images)) for images, _ in batches] == [[0, 1, 2]]


def beside_apple_double(members, start=""):
    """The members of a tar file of macOS, each after a hidden file."""
    for name, content in members:
        yield start + "._" + name.removeprefix(start), b"Mac OS X"
        yield name, content


def test_hidden_members_are_no_images(tmp_path):
    pytest.importorskip("webdataset")
    data = _stream(write_shards(tmp_path / "x", list(beside_apple_double(list(samples("jpg"))))))
    assert index_of(next(data.test_batches(batch_size=5))[0]) == [0, 1, 2]


NO_IMAGES = {
    "another kind": (
        samples("heic"),
        r"3 files are no images that can be read here: 3 \.heic \(pip install",
    ),
    "dots in the name": (samples("v2.jpg"), r"3 \.v2\.jpg"),
    "labels apart": (sorted(samples("jpg"), key=lambda member: member[0][-3:]), "each image needs a .cls of the same"),
    "AppleDouble": (
        beside_apple_double(list(samples("jpg", "d/")), "d/"),
        "hidden files of macOS .*COPYFILE_DISABLE",
    ),
    "empty": ([], "holds no image with a label"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_a_shard_without_any_image_is_refused_beforehand(case, tmp_path):
    pytest.importorskip("webdataset")
    members, message = NO_IMAGES[case]
    root = write_shards(tmp_path / "x", list(members), {"classes": ["a", "b"]})
    with pytest.raises(UserError, match=message) as caught:
        _stream(root)
    assert str(caught.value).startswith(f"{root}/train.tar")


def test_members_that_are_passed_over_are_counted(tmp_path, caplog):
    pytest.importorskip("webdataset")
    _stream(write_shards(tmp_path / "x", [*samples("jpg"), ("a.heic", b"photo"), ("a.cls", b"1"), ("a.txt", b"words")]))
    assert "2 files are no images that can be read here: 2 .heic (pip install pillow-heif)" in caplog.text


def test_a_split_without_samples_is_refused(tmp_path):
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "x", list(samples("jpg")))
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"]["num_samples"] = 0
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="the split train has no samples"):
        _stream(root)


@pytest.mark.parametrize(
    "shard", ["pipe:touch pwned", "pipe:touch pwned; cat x", "https://host/x.tar", "s3://b/x", "-"]
)
def test_no_command_is_run_for_a_shard(shard, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    root = write_shards(tmp_path / "x", list(samples("jpg")))
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"]["filenames"] = [shard]
    (root / "_info.json").write_text(json.dumps(info))
    for arguments in (("wds/x", root), (f"wds/{shard}",), ("wds/x", shard)):
        with pytest.raises(UserError, match="no command is run and nothing is fetched for shards here; write"):
            load_data(*arguments, image_size=32, workers=0)
    write_shards(tmp_path / "pipe:touch pwned;", list(samples("jpg")))  # a folder of such a name is a folder
    assert load_data("wds/x", tmp_path / "pipe:touch pwned;", image_size=32, workers=0).test_size == 3
    assert not list(tmp_path.glob("pwned*"))


def test_shards_of_a_hold_out_need_no_training_part_and_count_by_name(tmp_path):
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "x", list(samples("jpg")), {"classes": ["dog", "cat"]})
    info = json.loads((root / "_info.json").read_text())
    del info["splits"]["train"]
    (root / "_info.json").write_text(json.dumps(info))
    data = load_data("wds/x", root, preprocessing=network("cat", "cow", "dog"), hold_out=True, workers=0)
    assert data.classes == ("cat", "cow", "dog")
    assert next(data.test_batches(batch_size=3))[1].tolist() == [2, 0, 2]
    assert [label for _, label in data.test_examples([0, 1])] == [2, 0]
    with pytest.raises(UserError, match="has images of cat, and the network was trained on 1 other classes"):
        load_data("wds/x", root, preprocessing=network("dog"), hold_out=True, workers=0)


def test_odd_modes_in_shards(shards):
    root = shards(train=(2,), validation=(1,))
    with tarfile.open(root / "validation-0000.tar", "w") as tar:
        _add(tar, "0.png", encoded(Image.fromarray(np.full((40, 40), 65535, np.uint16))))
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
