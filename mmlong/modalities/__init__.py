"""Modalities: how raw tensors of one kind become a sequence and come back."""

from __future__ import annotations

from mmlong.modalities.audio import AudioModality, MuLawModality
from mmlong.modalities.contract import MODALITIES, Modality, create_modality, register_modality, row_layout
from mmlong.modalities.genome import GenomeModality
from mmlong.modalities.image import ImageModality
from mmlong.modalities.image_bytes import ImageBytesModality
from mmlong.modalities.image_palette import ImagePaletteModality, fit_palette
from mmlong.modalities.music import MusicModality
from mmlong.modalities.points import PointsModality
from mmlong.modalities.series import SeriesModality
from mmlong.modalities.text import TextModality
from mmlong.modalities.timm_patches import TimmPatchesModality
from mmlong.modalities.tokens import TokensModality
from mmlong.modalities.video import VideoModality

__all__ = [
    "MODALITIES",
    "AudioModality",
    "GenomeModality",
    "ImageBytesModality",
    "ImageModality",
    "ImagePaletteModality",
    "Modality",
    "MuLawModality",
    "MusicModality",
    "PointsModality",
    "SeriesModality",
    "TextModality",
    "TimmPatchesModality",
    "TokensModality",
    "VideoModality",
    "create_modality",
    "fit_palette",
    "register_modality",
    "row_layout",
]
