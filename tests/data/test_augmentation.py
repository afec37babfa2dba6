import numpy as np
import pytest
import torch

from cmpe_se.data import Augmentation, SmallImages
from cmpe_se.data.augmentation import augment, draw_places
from cmpe_se.errors import UserError


def naive(image, place, augmentation):
    """One image (C, H, W), one place: what the batched form has to give; and the (H, W) mask of cutout."""
    top, left, flip, row, column = place
    height, width = image.shape[1:]
    pad = augmentation.crop_padding
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    image = padded[:, top : top + height, left : left + width] if pad else image
    if augmentation.flip and flip:
        image = image[:, :, ::-1]
    mask = np.zeros((height, width), bool)
    first = [centre - augmentation.cutout // 2 for centre in (row, column)]
    for y in range(first[0], first[0] + augmentation.cutout):
        for x in range(first[1], first[1] + augmentation.cutout):
            if 0 <= y < height and 0 <= x < width:
                mask[y, x] = True
    return image, mask


CASES = [
    Augmentation(),
    Augmentation(crop_padding=1),
    Augmentation(flip=True),
    Augmentation(cutout=1),
    Augmentation(cutout=4),
    Augmentation(crop_padding=4, flip=True, cutout=5),
    Augmentation(crop_padding=9, flip=True, cutout=40),
]


@pytest.mark.parametrize("augmentation", CASES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7)])
def test_against_one_image_at_a_time(augmentation, shape):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, *shape), generator=random, dtype=torch.uint8)
    places = draw_places(32, shape[1:], augmentation, random)
    result, removed = augment(images, places, augmentation)
    assert result.dtype == torch.uint8
    for index in range(32):
        image, mask = naive(images[index].numpy(), places[index].tolist(), augmentation)
        assert np.array_equal(result[index].numpy(), image)
        assert np.array_equal(removed[index, 0].numpy() if removed is not None else np.zeros(shape[1:], bool), mask)


def test_places_reach_everything_evenly():
    places = draw_places(20_000, (8, 4), Augmentation(crop_padding=2), torch.Generator().manual_seed(0))
    for column, values in zip(places.unbind(1), (5, 5, 2, 8, 4), strict=True):
        share = torch.bincount(column).double() / len(column) * values
        assert len(share) == values
        assert share.sub(1).abs().max() < 0.1


def test_one_choice_leaves_the_others_alone():
    places = [
        draw_places(50, (8, 8), augmentation, torch.Generator().manual_seed(3))
        for augmentation in (Augmentation(flip=True), Augmentation(flip=True, crop_padding=4, cutout=2))
    ]
    assert torch.equal(places[0][:, 2:], places[1][:, 2:])


def test_cutout_is_the_mean_colour():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    labels = torch.zeros(64, dtype=torch.int64)
    data = SmallImages("x", ("a", "b"), images, labels, images, labels)
    whole = Augmentation(cutout=100)
    (batch, _), *_ = data.train_batches(0, batch_size=64, seed=0, augmentation=whole)
    assert (batch == 0).all()


WRONG = {
    "negative padding": ({"crop_padding": -1}, "crop_padding is -1"),
    "negative cutout": ({"cutout": -2}, "cutout is -2"),
    "negative jitter": ({"color_jitter": -0.1}, "color_jitter"),
    "probability": ({"random_erasing": 1.5}, "random_erasing is 1.5"),
    "scale above 1": ({"scale": (0.5, 1.5)}, r"scale is \(0.5, 1.5\).*up to 1"),
    "scale in the wrong order": ({"scale": (0.9, 0.5)}, "scale"),
    "ratio of nothing": ({"ratio": (0.0, 1.0)}, "ratio"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(case):
    fields, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        Augmentation(**fields)
