"""Named data sets to batches: ``load_data`` gives an ``ImageData``, ``read_image`` is the one reader of image files."""

from cmpe_se.data.augmentation import Augmentation
from cmpe_se.data.class_files import Listing
from cmpe_se.data.interface import ImageData
from cmpe_se.data.large import LargeImages
from cmpe_se.data.load import DATA_SETS, is_fixed_size, load_data
from cmpe_se.data.plain import first_images, plain_training_batches
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.readers import DataOptions
from cmpe_se.data.reading import read_image
from cmpe_se.data.small import SmallImages
from cmpe_se.data.streamed import StreamedImages
from cmpe_se.data.validation import validation_split

__all__ = [
    "DATA_SETS",
    "Augmentation",
    "DataOptions",
    "ImageData",
    "LargeImages",
    "Listing",
    "Preprocessing",
    "SmallImages",
    "StreamedImages",
    "first_images",
    "is_fixed_size",
    "load_data",
    "plain_training_batches",
    "read_image",
    "validation_split",
]
