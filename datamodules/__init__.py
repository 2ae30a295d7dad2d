"""Files to batches: shards (write, index, verify), their order, and one LightningDataModule per modality.

Knows files and nothing of backbones. Import it as ``mmlong.datamodules`` only.
"""

from __future__ import annotations

if __name__ == "datamodules":
    raise ImportError("import mmlong.datamodules, not datamodules: under two names its classes would exist twice")
