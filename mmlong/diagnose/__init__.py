"""Tiny models on generated tasks: does a mechanism do what it is known for? Behind ``mmlong diagnose``."""

from mmlong.diagnose.cell import Cell, Setting, learn
from mmlong.diagnose.orderings import ORDERINGS, Ordering
from mmlong.diagnose.probes import PROBES, Probe, list_probes

__all__ = ["ORDERINGS", "PROBES", "Cell", "Ordering", "Probe", "Setting", "learn", "list_probes"]
