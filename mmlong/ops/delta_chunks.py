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

from typing import ClassVar

import torch
from torch import Tensor

from mmlong.ops.chunk_forms import Given
from mmlong.ops.decayed_pairs import Documents, decay_of, scaled, unit_inverse


class DeltaChunks:
    """Some chunks, as :class:`mmlong.ops.chunk_forms.Chunks`: their inputs, and what the forward and the backward both need of them.

    Attributes:
        names: of the inputs ``(n, M, T, .)``: ``beta`` has one number a token, ``g`` one or N; subclasses have what is optional.
    """

    names: ClassVar[tuple[str, ...]] = ("q", "k", "beta", "v")

    def __init__(self, inputs: Given, documents: Documents | None) -> None:
        given = dict(zip(self.names, inputs, strict=True))
        self.q, self.k, self.beta, self.v = (given[name] for name in DeltaChunks.names)
        self.g = given.get("g")
        self.erase = given.get("erase", self.k)
        self.decay = decay_of(self.g, self.q, documents)
        pairs, self.reads = self.decay.products([self.erase, self.q], self.k)
        self.pairs = pairs.tril(-1)
        self.inverse = unit_inverse(self.beta * self.pairs)
        self.ask = scaled(self.q, self.decay.into)
        self.forget = self.beta * scaled(self.erase, self.decay.into)
        self.leave = scaled(self.k, self.decay.out)

    def run(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the state before the first chunk ``(M, N, P)``: outputs ``(n, M, T, P)``, the states before each chunk ``(n, M, N, P)``, the one after the last."""
        written = self.inverse @ (self.beta * self.v)
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
        n = self.v.shape[0]
        torch._check(n < 1 << passes)
        written = self.inverse @ (self.beta * self.v)
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

    def gradients(self, before: Tensor, after: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Given, Tensor]:
        """Gradients of the inputs, and of the state before the first chunk.

        Args:
            before: the states before each chunk ``(n, M, N, P)``.
            after: the one after the last ``(M, N, P)``.
            dy: of the outputs ``(n, M, T, P)``.
            dstate: of ``after``.
        """
        q, k, v, beta, g = self.q, self.k, self.v, self.beta, self.g
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
        found = {"q": dq, "k": dk, "beta": dbeta, "v": dv, "erase": de}
        if g is not None:
            dG = q * dq + self.erase * de - k * dk
            # The end of a chunk's decay scales all of the state after it.
            ends = torch.cat([before[1:], after[None]]) * dafter
            dG[..., -1, :] += ends.sum(-1)
            dG = dG if g.shape[-1] > 1 else dG.sum(-1, keepdim=True)
            found["g"] = dG.flip(-2).cumsum(-2).flip(-2)
        if "erase" not in self.names:
            dk += de
        return tuple(found[name] for name in self.names), dstate


class TwoKeys(DeltaChunks):
    """With keys of their own at which is erased."""

    names = ("q", "k", "beta", "erase", "v")


class Decayed(DeltaChunks):
    """With a decay."""

    names = ("q", "k", "beta", "g", "v")


class DecayedTwoKeys(DeltaChunks):
    """With both."""

    names = ("q", "k", "beta", "g", "erase", "v")
