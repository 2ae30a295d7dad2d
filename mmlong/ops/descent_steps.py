"""What a network that learns by mini-batches is at each token, as sums over the mini-batch: the coefficients of :mod:`mmlong.ops.test_time`.

With ``u_s`` the gradients of a mini-batch, all taken at the anchor A, and two parts of the state before it, W and W', the network at its token ``t`` and both parts after its last one are

    W_t = read_t W + read_other_t W' - sum_{s<=t} write_ts u_s
    W  <- keep W + keep_other W' - sum_s leave_s u_s
    W' <- other W' - sum_s other_leave_s u_s

| rule | W | W' |
|---|---|---|
| plain, ``W_t = A - p_t sum_{s<=t} e_s u_s`` | A | ``sum e_s u_s`` of the tokens so far |
| momentum, ``S_t = eta_t S_{t-1} - theta_t u_t``, ``W_t = (1 - alpha_t) W_{t-1} + S_t`` | the network | S |

Unrolled, the second is a product of two triangular matrices of decays: ``write = D H diag(theta)``, ``D_ts = prod_{s<r<=t} (1 - alpha_r)``, ``H_ts = prod_{s<r<=t} eta_r``.

A mini-batch may be here in part, its first tokens or its last ones being in other pieces of the sequence: slots without a token change nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmlong.ops.decayed_pairs import LEAST
from mmlong.ops.mini_batches import Frames


class Steps(NamedTuple):
    """Coefficients of frames ``(n, M, ...)``, M rows and heads. ``None``: for ``read`` and ``keep`` one, for the rest that there is no W'.

    Attributes:
        read, read_other: ``(T, 1)``.
        write: ``(T, T)``.
        keep, keep_other, other: ``(1, 1)``.
        leave, other_leave: ``(T, 1)``.
    """

    read: Tensor | None
    read_other: Tensor | None
    write: Tensor
    keep: Tensor | None
    keep_other: Tensor | None
    leave: Tensor
    other: Tensor | None
    other_leave: Tensor | None


def plain_steps(rate: Tensor, place_rate: Tensor, frames: Frames, heads: int) -> Steps:
    """Of plain descent; without W' where all mini-batches are whole, since it is zero before each.

    Args:
        rate: e ``(n, M, T, 1)``, zero where there is no token.
        place_rate: p ``(size,)``.
        frames: of the tokens.
        heads: H.
    """
    p = place_rate[frames.place].transpose(0, 1)[..., None]  # (n, 1 or B, T, 1)
    if p.shape[1] > 1:
        p = p.repeat_interleave(heads, 1)
    write = (p * rate.mT).tril()
    closes, last = frames.each(frames.closes, heads), place_rate[-1]
    if closes is None:
        return Steps(None, None, write, None, None, last * rate, None, None)
    taken = torch.where(closes, last, 0)  # the sum becomes a step of the network with the mini-batch's last token
    left = (~closes).to(rate)
    return Steps(None, -p, write, None, -taken, taken * rate, left, -left * rate)


def momentum_steps(theta: Tensor, log_keep: Tensor, log_eta: Tensor, there: Tensor | None) -> Steps:
    """Of descent with momentum and decay.

    Args:
        theta: rates ``(n, M, T, 1)``, zero where there is no token.
        log_keep: ``log(1 - alpha)``, likewise; anything below ``LEAST`` counts as that.
        log_eta: ``log eta``, likewise.
        there: bool ``(n, M, T, 1)``, where there is a token; ``None`` for everywhere.
    """
    kept, decays = _products(log_keep)
    past, momenta = _products(log_eta)
    if there is not None:
        decays = torch.where(there.mT, decays, 0)  # where there is no token, S is not added once more
    pushed, written = decays @ past, momenta * theta.mT
    write = decays @ written
    return Steps(
        kept,
        pushed,
        write,
        kept[..., -1:, :],
        pushed[..., -1:, :],
        write[..., -1:, :].mT,
        past[..., -1:, :],
        written[..., -1:, :].mT,
    )


def _products(log: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the factors up to each token ``(T, 1)``, and of those after s up to t ``(T, T)``, for s <= t."""
    T = log.shape[-2]
    exact = torch.float32 if log.device.type == "mps" else torch.float64
    sums = log.clamp_min(LEAST).to(exact).cumsum(-2)  # differences of large sums keep their digits
    later = torch.ones(T, T, dtype=torch.bool, device=log.device).triu(1)
    return sums.to(log).exp(), (sums - sums.mT).to(log).masked_fill(later, float("-inf")).exp()
