"""Tasks: one LightningModule an objective."""

from __future__ import annotations

from mmlong.tasks.base import ArchitectureMismatchError, Task
from mmlong.tasks.classify import ClassifyTask

__all__ = ["ArchitectureMismatchError", "ClassifyTask", "Task"]
