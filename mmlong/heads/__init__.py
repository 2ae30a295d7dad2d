"""Heads: features ``(B, L, D)`` to a prediction and its loss."""

from __future__ import annotations

from mmlong.heads.both_strands import BothStrandsHead
from mmlong.heads.categorical import CategoricalHead
from mmlong.heads.classify import ClassifyHead
from mmlong.heads.contract import HEADS, Head, create_head, register_head
from mmlong.heads.logistic_mixture import LogisticMixtureHead
from mmlong.heads.match import MatchHead
from mmlong.heads.multilabel import MultiLabelHead
from mmlong.heads.project import ProjectHead
from mmlong.heads.readout import ReadoutHead
from mmlong.heads.regress import RegressHead, RegressTokensHead
from mmlong.heads.sampling import GREEDY, Sampling
from mmlong.heads.tag import TagHead

__all__ = [
    "GREEDY",
    "HEADS",
    "BothStrandsHead",
    "CategoricalHead",
    "ClassifyHead",
    "Head",
    "LogisticMixtureHead",
    "MatchHead",
    "MultiLabelHead",
    "ProjectHead",
    "ReadoutHead",
    "RegressHead",
    "RegressTokensHead",
    "Sampling",
    "TagHead",
    "create_head",
    "register_head",
]
