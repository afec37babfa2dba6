"""Images with boxes, from folders in COCO's and Pascal VOC's format."""

from cmpe_se.data.detection.coco import read_coco
from cmpe_se.data.detection.images import DetectionImages
from cmpe_se.data.detection.load import DetectionData, load_detection
from cmpe_se.data.detection.voc import read_voc

__all__ = ["DetectionData", "DetectionImages", "load_detection", "read_coco", "read_voc"]
