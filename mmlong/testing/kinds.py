"""Mixers of each kind of state: what a test of something that holds mixers needs to run over, where every mixer is held to the contract by itself."""

from __future__ import annotations

KINDS_OF_STATE = ("attention", "hyena", "local", "mamba2", "masked_conv2d", "s4d")
"""Caches that grow, and that do not; past inputs; a matrix; rows of a raster; complex numbers."""

MORE_KINDS = (*KINDS_OF_STATE, "moba", "retnet", "rwkv4", "ttt_linear")
"""And documents counted from their first token; a matrix and positions; vectors and an exponent; weights that learn."""
