"""Tasks: one LightningModule an objective."""

from __future__ import annotations

from mmlong.tasks.autoregress import AutoregressTask
from mmlong.tasks.base import ArchitectureMismatchError, Task
from mmlong.tasks.classify import ClassifyTask
from mmlong.tasks.contrast import ContrastTask
from mmlong.tasks.joint import JointTask
from mmlong.tasks.joint_contrast import JointContrastTask
from mmlong.tasks.joint_masked import JointMaskedTask
from mmlong.tasks.masked import MaskedTask
from mmlong.tasks.masking import Masking
from mmlong.tasks.match import MatchTask
from mmlong.tasks.multilabel import MultiLabelTask
from mmlong.tasks.regress import RegressTask
from mmlong.tasks.tag import TagTask

__all__ = [
    "ArchitectureMismatchError",
    "AutoregressTask",
    "ClassifyTask",
    "ContrastTask",
    "JointContrastTask",
    "JointMaskedTask",
    "JointTask",
    "MaskedTask",
    "Masking",
    "MatchTask",
    "MultiLabelTask",
    "RegressTask",
    "TagTask",
    "Task",
]
