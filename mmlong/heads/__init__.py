"""Heads: features ``(B, L, D)`` to a prediction and its loss."""

from __future__ import annotations

from mmlong.heads.categorical import CategoricalHead
from mmlong.heads.classify import ClassifyHead
from mmlong.heads.contract import HEADS, Head, create_head, register_head
from mmlong.heads.readout import ReadoutHead

__all__ = ["HEADS", "CategoricalHead", "ClassifyHead", "Head", "ReadoutHead", "create_head", "register_head"]
