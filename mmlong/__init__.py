"""mmlong: train models on sequences too long for a dense Transformer, all on one shared backbone."""

from __future__ import annotations

__version__ = "0.1.0"
