"""Folders of images and masks are read pair by pair, and what is wrong with one is said in one line."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from cmpe_se.data.segmentation import load_segmentation, read_mask
from cmpe_se.errors import UserError


def write_pair(image_folder, mask_folder, name, seed=0, *, classes=3, size=(12, 9), suffix=".jpg"):
    """An image and a palette mask of classes 0 up to ``classes`` - 1 with an ignored border; the mask's indices."""
    random = np.random.default_rng(seed)
    for folder in (image_folder, mask_folder):
        folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(image_folder / f"{name}{suffix}")
    labels = random.integers(0, classes, size[::-1], dtype=np.uint8)
    labels[0], labels[1, :classes] = 255, range(classes)
    mask = Image.fromarray(labels, mode="P")
    mask.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())  # colours that are no indices
    mask.save(mask_folder / f"{name}.png")
    return labels


@pytest.fixture
def voc(tmp_path):
    """Two images for training, one for val, and a test list without masks, as VOC has it."""
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, names in (("train", ["a", "b"]), ("val", ["c"]), ("test", ["d"])):
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
    for seed, name in enumerate("abc"):
        write_pair(tmp_path / "JPEGImages", tmp_path / "SegmentationClass", name, seed)
    Image.new("RGB", (12, 9)).save(tmp_path / "JPEGImages" / "d.jpg")
    return tmp_path


@pytest.fixture
def plain(tmp_path):
    for seed in range(10):
        write_pair(tmp_path / "images", tmp_path / "masks", f"{seed:02}", seed, suffix=".png")
    return tmp_path


def test_voc(voc):
    data = load_segmentation(voc)
    assert data.classes == ("0", "1", "2")
    assert [pair.image.stem for pair in data.train.pairs] == ["a", "b"]
    assert [pair.image.stem for pair in data.test.pairs] == ["c"]
    image, mask = data.train[1]
    assert (image.dtype, image.shape) == (torch.uint8, (3, 9, 12))
    assert (mask.dtype, mask.shape) == (torch.int64, (9, 12))
    with Image.open(voc / "SegmentationClass" / "b.png") as file:
        assert mask.tolist() == np.array(file).tolist()
    assert (mask[0] == 255).all()


def test_voc_below_its_development_kit_with_its_class_names(voc, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(voc, root / "VOCdevkit" / "VOC2012")
    data = load_segmentation(root)
    assert len(data.classes) == 21
    assert data.classes[15] == "person"
    shutil.copytree(voc, root / "VOCdevkit" / "VOC2007")
    with pytest.raises(UserError, match=r"several years of VOC; give one of .*VOC2007"):
        load_segmentation(root)


def test_plain_folder_holds_a_fifth_out(plain):
    one, again = load_segmentation(plain), load_segmentation(plain)
    assert (len(one.train), len(one.test)) == (8, 2)
    assert one.test.pairs == again.test.pairs
    assert not set(one.train.pairs) & set(one.test.pairs)
    for pair in one.train.pairs + one.test.pairs:
        assert pair.image.stem == pair.mask.stem


@pytest.mark.parametrize("order", ["images/train", "train/images"])
def test_plain_folder_with_parts(tmp_path, order):
    for part in ("train", "Val"):
        for seed in range(2):
            image, mask = (order.replace("train", part).replace("images", kind) for kind in ("images", "masks"))
            write_pair(tmp_path / image / "deeper", tmp_path / mask / "deeper", f"{part}{seed}", seed)
    data = load_segmentation(tmp_path)
    assert [pair.mask.stem for pair in data.train.pairs] == ["train0", "train1"]
    assert [pair.mask.stem for pair in data.test.pairs] == ["Val0", "Val1"]
    swapped = load_segmentation(tmp_path, train_split="Val", test_split="train")
    assert swapped.train.pairs == data.test.pairs
    with pytest.raises(UserError, match="no train split other; choose one of"):
        load_segmentation(tmp_path, train_split="other")


def test_names_of_classes(plain):
    (plain / "classes.txt").write_text("background\ncat\n\ndog\nbird\n")
    assert load_segmentation(plain).classes == ("background", "cat", "dog", "bird")


def test_transform_moves_image_and_mask_alike(plain):
    def read(transform):
        return load_segmentation(plain, transform=transform).train[0]

    (image, mask), (mirrored, mirrored_mask) = read(None), read(v2.RandomHorizontalFlip(1.0))
    assert torch.equal(image.flip(2), mirrored)
    assert torch.equal(mask.flip(1), mirrored_mask)
    _, small = read(v2.Resize((4, 4)))
    assert set(small.unique().tolist()) <= {0, 1, 2, 255}


def test_turned_photograph_fits_its_upright_mask(plain):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(plain / "images" / "00.png") as image:
        image.rotate(90, expand=True).save(plain / "images" / "00.png", exif=exif)
    data = load_segmentation(plain)
    assert all(part[index][0].shape == (3, 9, 12) for part in data[1:] for index in range(len(part)))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_masks_without_a_palette(tmp_path, mode):
    labels = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    Image.fromarray(labels * (1 if mode == "L" else 255)).convert(mode).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == labels.tolist()


def spoil(root, kind):
    """Damage a folder that could be read."""
    first = root / "masks" / "03.png"
    if kind == "missing":
        first.unlink()
        (root / "masks" / "05.png").unlink()
    elif kind == "size":
        Image.new("P", (12, 8)).save(first)
    elif kind == "class":
        (root / "classes.txt").write_text("background\nthing\n")
    elif kind == "colours":
        Image.new("RGB", (12, 9)).save(first)
    elif kind == "16 bits":
        Image.new("I;16", (12, 9)).save(first)
    elif kind == "truncated":
        first.write_bytes(first.read_bytes()[:60])
    elif kind == "no mask":
        first.write_text("not an image")
    elif kind == "JPEG":
        Image.new("L", (12, 9)).save(first.with_suffix(".jpg"))
        first.unlink()
    elif kind == "broken image":
        (root / "images" / "03.png").write_text("not an image")
    elif kind == "no images":
        shutil.rmtree(root / "images")
        (root / "images").mkdir()
    elif kind == "twins":
        Image.new("RGB", (12, 9)).save(root / "images" / "03.jpg")
    elif kind == "0 and 255":
        for path in (root / "masks").iterdir():
            Image.fromarray(np.eye(9, 12, dtype=np.uint8) * 255).save(path)
    elif kind == "layout":
        (root / "masks").rename(root / "labels")
    else:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"masks/03\.png is missing: .*images has an image without a mask, and 1 more"),
        ("size", r"the mask .*03\.png has 12x8 pixels, and its image .*03\.png 12x9"),
        ("class", r"the mask .* holds class 2, and there are 2 classes, 0 to 1 \(and 255 for what is ignored\)"),
        ("colours", r"the mask .*03\.png has pixels of the kind RGB; write class indices as 8-bit grey or palette"),
        ("16 bits", r"the mask .*03\.png has pixels of the kind I;16"),
        ("truncated", r"the mask .*03\.png cannot be read \(.*\); replace it"),
        ("no mask", r"the mask .*03\.png cannot be read"),
        ("JPEG", r"masks/03\.png is missing"),
        ("broken image", r"images/03\.png is not an image"),
        ("no images", r"images holds no images"),
        ("twins", r"03\.(png|jpg) and .*03\.(png|jpg) have one name"),
        ("0 and 255", r"hold no class but 0 \(and 255, which is ignored\); give objects the indices from 1 up"),
        ("layout", r"holds no images that can be found; expected JPEGImages/"),
        ("folder", r"is no folder; give one with JPEGImages/"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(plain, kind, words):
    spoil(plain, kind)
    with pytest.raises(UserError, match=words) as error:
        load_segmentation(plain)
    assert "\n" not in str(error.value)


def test_voc_lists_that_are_wrong(voc):
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("a\nnone\n")
    with pytest.raises(UserError, match=r"train\.txt names none, of which .*JPEGImages has no image"):
        load_segmentation(voc)
    with pytest.raises(UserError, match=r"SegmentationClass/d\.png is missing"):
        load_segmentation(voc, train_split="val", test_split="test")
    for path in (voc / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no lists of names such as train\.txt"):
        load_segmentation(voc)


def test_a_class_that_only_test_masks_have_is_refused(plain):
    held = load_segmentation(plain).test.pairs[0].mask
    Image.fromarray(np.full((9, 12), 7, dtype=np.uint8)).save(held)
    with pytest.raises(UserError, match="holds class 7, and there are 3 classes"):
        load_segmentation(plain)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("classes.txt", "write the names of the classes, one a line"),
        ("ImageSets/Segmentation/val.txt", "it should list a part's images, one a line"),
    ],
)
def test_lists_that_are_no_text(tmp_path, name, advice):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "JPEGImages" / "a.jpg")
    Image.new("L", (4, 4)).save(tmp_path / "SegmentationClass" / "a.png")
    for part in ("train", "val"):
        (tmp_path / f"ImageSets/Segmentation/{part}.txt").write_text("a\n")
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=rf"{name} cannot be read .*; {advice}"):
        load_segmentation(tmp_path)
