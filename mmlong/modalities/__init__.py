"""Modalities: how raw tensors of one kind become a sequence and come back."""

from __future__ import annotations

from mmlong.modalities.contract import MODALITIES, Modality, create_modality, register_modality
from mmlong.modalities.image import ImageModality

__all__ = ["MODALITIES", "ImageModality", "Modality", "create_modality", "register_modality"]
