"""Token shift: each token beside the one before it, which RWKV mixes before every projection (Peng et al. 2023, arXiv 2305.13048).

Definition: ``previous_t = x_{t-1}``, where ``x`` before position 0 is the last token of the past, and nothing (zero) at the beginning of a document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlong.layout import Layout


def token_shift(x: Tensor, last: Tensor, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
    """The token before each one.

    Args:
        x: ``(B, L, D)``.
        last: the last token of the past ``(B, D)``, zero from the beginning.
        layout: lengths and resets are honoured.

    Returns:
        ``(previous, last)``: ``previous`` like ``x``, and the last token at each row's own length, in at least float32.
    """
    previous = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    if layout is not None and layout.resets is not None:
        previous = previous.masked_fill(layout.resets[..., None], 0)
    return previous, last_token(x, last, layout)


def last_token(x: Tensor, last: Tensor, layout: Layout | None = None) -> Tensor:
    """The last token of each row ``(B, D)``, in at least float32: of ``x (B, L, D)`` at the row's own length, or ``last`` where a row has none here."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if layout is None or layout.lengths is None:
        return x[:, -1].to(dtype, copy=True)
    longer = torch.cat([last[:, None].to(dtype), x.to(dtype)], 1)
    index = layout.lengths[:, None, None].expand(-1, 1, x.shape[2])
    return longer.gather(1, index).squeeze(1)
