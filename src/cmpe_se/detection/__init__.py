"""Object detection: backbones for torchvision's detectors, and images with boxes in COCO's and Pascal VOC's format."""

from cmpe_se.detection.coco import read_coco
from cmpe_se.detection.feature_pyramid import FeaturePyramidBackbone, fpn_backbone
from cmpe_se.detection.images import DetectionImages
from cmpe_se.detection.load import DetectionData, load_detection
from cmpe_se.detection.voc import read_voc

__all__ = [
    "DetectionData",
    "DetectionImages",
    "FeaturePyramidBackbone",
    "fpn_backbone",
    "load_detection",
    "read_coco",
    "read_voc",
]
