"""The delta rule over chunks of tokens: what happens inside chunks by matrix products, and a loop over the chunks for the state.

In a chunk of ``T`` tokens with the state ``S_0 (N x P)`` before it, let ``u_t (P)`` be what token ``t`` writes at its key. What its erasing key ``e_t`` reads is the decayed
state before the chunk and what earlier tokens wrote, so that (``G_t`` the sum of log decays up to ``t``, :mod:`mmlong.ops.decayed_pairs`)

    u_t = beta_t (v_t - S_0^T (exp(G_t) e_t) - sum_{s<t} A_ts u_s),    A_ts = sum_n e_tn k_sn exp(G_tn - G_sn)

or, tokens as rows, ``(I + beta A) U = beta (V - E S_0)`` with ``E = exp(G) e``: one triangular system a chunk (the UT transform of Yang et al. 2024, arXiv 2406.06484,
after Joffrain et al. 2006). With ``X = (I + beta A)^{-1}``, ``M_ts`` the decayed products of queries and keys (s <= t) and ``K = exp(G_T - G) k``,

    U = X beta V - (X beta E) S_0;    Y = (exp(G) q) S_0 + M U;    S_T = exp(G_T) S_0 + K^T U

Everything but ``S_0`` is had for all chunks at once; the loop takes two small products a chunk. Backwards, with ``dR`` the gradient of ``beta (V - E S_0)``,

    dR = X^T (M^T dY + K dS_T);    dS_0 = exp(G_T) dS_T + (exp(G) q)^T dY - (beta E)^T dR;    d(beta A) = -dR U^T

and again only ``dS`` needs the loop. Everywhere exponents are sums of log decays, <= 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmlong.ops.decayed_pairs import Documents, decay_of, scaled, unit_inverse


class Inputs(NamedTuple):
    """Chunks ``(n, M, T, .)``: ``n`` one after another, ``M`` rows and heads, T a power of two. Also the gradients of these."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor  # (n, M, T, 1)
    g: Tensor | None  # (n, M, T, 1 or N)
    erase: Tensor | None


class DeltaChunks:
    """Some chunks: their inputs, and what the forward and the backward both need of them."""

    def __init__(self, inputs: Inputs, documents: Documents | None) -> None:
        self.inputs = inputs
        q, k, _, beta, g, erase = inputs
        self.erase = k if erase is None else erase
        self.decay = decay_of(g, q, documents)
        pairs, self.reads = self.decay.products([self.erase, q], k)
        self.pairs = pairs.tril(-1)
        self.inverse = unit_inverse(beta * self.pairs)
        self.ask = scaled(q, self.decay.into)
        self.forget = beta * scaled(self.erase, self.decay.into)
        self.leave = scaled(k, self.decay.out)

    def run(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the state before the first chunk ``(M, N, P)``: outputs ``(n, M, T, P)``, the states before each chunk ``(n, M, N, P)``, the one after the last."""
        written = self.inverse @ (self.inputs.beta * self.inputs.v)
        forgotten = self.inverse @ self.forget
        total, states, writes = self.decay.total, [], []
        for c in range(written.shape[0]):
            states.append(state)
            writes.append(torch.baddbmm(written[c], forgotten[c], state, alpha=-1))
            state = torch.baddbmm(scaled(state, None if total is None else total[c]), self.leave[c].mT, writes[-1])
        before = torch.stack(states)
        return self.ask @ before + self.reads @ torch.stack(writes), before, state

    def run_by_doubling(self, state: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """Outputs and the state after the last chunk, for an unknown number of chunks (at most ``2 ** passes - 1``), over which no loop can be written.

        A chunk maps a state to ``Phi S + Psi``, and such maps compose: a scan in doubling steps (Hillis & Steele 1986).
        """
        n = self.inputs.v.shape[0]
        torch._check(n < 1 << passes)
        written = self.inverse @ (self.inputs.beta * self.inputs.v)
        forgotten = self.inverse @ self.forget
        N = self.leave.shape[-1]
        kept = torch.eye(N, dtype=state.dtype, device=state.device)
        kept = kept.expand(n, state.shape[0], N, N) if self.decay.total is None else kept * self.decay.total
        # The state before the first chunk is a map that forgets what it is given.
        map_ = torch.cat([torch.zeros_like(kept[:1]), kept - self.leave.mT @ forgotten])
        add = torch.cat([state[None], self.leave.mT @ written])
        place = torch.arange(n + 1, device=state.device)
        for step in (1 << i for i in range(passes)):
            source = (place - step).clamp_min(0)
            reached = (place >= step)[:, None, None, None]
            add = add + torch.where(reached, map_ @ add.index_select(0, source), 0)
            map_ = torch.where(reached, map_ @ map_.index_select(0, source), map_)
        before = add[:n]
        return self.ask @ before + self.reads @ (written - forgotten @ before), add[n]

    def gradients(self, before: Tensor, after: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Inputs, Tensor]:
        """Gradients of the inputs, and of the state before the first chunk.

        Args:
            before: the states before each chunk ``(n, M, N, P)``.
            after: the one after the last ``(M, N, P)``.
            dy: of the outputs ``(n, M, T, P)``.
            dstate: of ``after``.
        """
        q, k, v, beta, g, _ = self.inputs
        decay, total = self.decay, self.decay.total
        turned = self.inverse.mT
        dright, leaving, asked = turned @ (self.reads.mT @ dy), turned @ self.leave, self.ask.mT @ dy
        dafter = torch.empty_like(before)
        for c in reversed(range(before.shape[0])):
            dafter[c] = dstate
            dright[c].baddbmm_(leaving[c], dstate)
            dstate = asked[c].add_(scaled(dstate, None if total is None else total[c]))
            dstate.baddbmm_(self.forget[c].mT, dright[c], alpha=-1)
        missing = v - scaled(self.erase, decay.into) @ before  # of each value, before the chunk's own writes
        writes = self.inverse @ (beta * missing)
        dv = beta * dright
        dsystem = -(dright @ writes.mT)
        dbeta = (dright * missing).sum(-1, keepdim=True) + (dsystem * self.pairs).sum(-1, keepdim=True)
        dreads = dy @ writes.mT
        (de, dq), dk = decay.gradients([self.erase, q], k, [(beta * dsystem).tril_(-1), dreads.tril_()])
        dq += scaled(dy @ before.mT, decay.into)
        de -= scaled(dv @ before.mT, decay.into)
        dk += scaled(writes @ dafter.mT, decay.out)
        dg = None
        if g is not None:
            dG = q * dq + self.erase * de - k * dk
            # The end of a chunk's decay scales all of the state after it.
            ends = torch.cat([before[1:], after[None]]) * dafter
            dG[..., -1, :] += ends.sum(-1)
            dG = dG if g.shape[-1] > 1 else dG.sum(-1, keepdim=True)
            dg = dG.flip(-2).cumsum(-2).flip(-2)
        if self.inputs.erase is None:
            return Inputs(dq, dk.add_(de), dv, dbeta, dg, None), dstate
        return Inputs(dq, dk, dv, dbeta, dg, de), dstate
