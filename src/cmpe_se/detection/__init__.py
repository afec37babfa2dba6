"""Backbones for torchvision's detectors."""

from cmpe_se.detection.feature_pyramid import FeaturePyramidBackbone, fpn_backbone

__all__ = ["FeaturePyramidBackbone", "fpn_backbone"]
