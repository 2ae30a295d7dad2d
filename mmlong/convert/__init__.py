"""Published checkpoints in ``transformers``' format to ours and back, where the mechanism is the same.

Importing this package registers the house's own families; other packages' come by the entry-point group ``mmlong.converters``.
"""

from __future__ import annotations

from mmlong.convert import bert, caduceus, gpt2, hyena_dna, mamba, perceiver, recurrent_gemma, rwkv, xlstm  # noqa: F401  (each registers its families)
from mmlong.convert.contract import CONVERTERS, Converter, ConvertError, Published, register_converter
from mmlong.convert.folder import back, convert, there
from mmlong.convert.table import Change, Row

__all__ = [
    "CONVERTERS",
    "Change",
    "ConvertError",
    "Converter",
    "Published",
    "Row",
    "back",
    "convert",
    "register_converter",
    "there",
]
