"""Object detection: backbones for torchvision's detectors, and annotated images of a folder."""

from cmpe_se.detection.feature_pyramid import FeaturePyramidBackbone, fpn_backbone

__all__ = ["FeaturePyramidBackbone", "fpn_backbone"]
