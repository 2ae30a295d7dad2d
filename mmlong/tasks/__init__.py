"""Tasks: one LightningModule an objective."""

from __future__ import annotations

from mmlong.tasks.autoregress import AutoregressTask
from mmlong.tasks.base import ArchitectureMismatchError, Task
from mmlong.tasks.classify import ClassifyTask

__all__ = ["ArchitectureMismatchError", "AutoregressTask", "ClassifyTask", "Task"]
