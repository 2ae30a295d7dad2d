"""The shared backbone: blocks, directions, pooled stages, and training in segments."""

from __future__ import annotations

from mmlong.backbone.block import Block, Merge
from mmlong.backbone.directions import BothWays, Reversed, create_directed
from mmlong.backbone.reverse_complement import ReverseComplement, reverse_complement_features
from mmlong.backbone.segmented import segmented_loss
from mmlong.backbone.stack import Backbone, BackboneConfig
from mmlong.backbone.time_step import Resampled, resample

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Block",
    "BothWays",
    "Merge",
    "Resampled",
    "ReverseComplement",
    "Reversed",
    "create_directed",
    "resample",
    "reverse_complement_features",
    "segmented_loss",
]
