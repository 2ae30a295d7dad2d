"""Stand-ins for packages that need a GPU: their documented signatures and checks, computed token by token from their definitions."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.ops.backends import FLOATS, Backends

Calls = list[dict[str, Any]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backends, str], None]:
    """``here(op, name)`` lets a backend be asked for on this machine and in any type; what else it refuses it goes on refusing."""

    def allow(op: Backends, name: str) -> None:
        able = replace(op[name], devices=None, dtypes=FLOATS, available=lambda: (True, "a stand-in"))
        monkeypatch.setitem(op._known, name, able)

    return allow


def install(patch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Put a module with these functions, and the packages above it, where an import finds them."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        patch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


@pytest.fixture
def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """``mamba_ssm.ops.triton.ssd_combined``: ``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T``, ``y_t = S_t C_t + D x_t``; a change of ``seq_idx`` (before: 0) drops ``S``."""
    calls: Calls = []

    def mamba_chunk_scan_combined(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Any:
        batch, length, heads, width = x.shape
        groups, columns = B.shape[2:]
        assert heads % groups == 0
        assert B.shape == C.shape == (batch, length, groups, columns)
        assert dt.shape == (batch, length, heads)
        assert A.shape == (heads,)
        assert B.dtype == C.dtype == x.dtype
        assert x.stride(-1) == B.stride(-1) == C.stride(-1) == 1
        assert initial_states is None or initial_states.shape == (batch, heads, width, columns)
        if seq_idx is not None:
            assert seq_idx.shape == (batch, length)
            assert (seq_idx.dtype, seq_idx.is_contiguous()) == (torch.int32, True)
        assert not torch.is_autocast_enabled("cpu")
        calls.append({"chunk_size": chunk_size, "dtype": x.dtype, "seq_idx": seq_idx})
        wide = torch.promote_types(x.dtype, torch.float32)
        S = x.new_zeros(batch, heads, width, columns, dtype=wide) if initial_states is None else initial_states.to(wide)
        keys, queries = (t.to(wide).repeat_interleave(heads // groups, 2) for t in (B, C))
        values, outputs = x.to(wide), []
        for t in range(length):
            if seq_idx is not None:
                before = seq_idx[:, t - 1] if t else torch.zeros_like(seq_idx[:, 0])
                S = torch.where((seq_idx[:, t] == before)[:, None, None, None], S, 0)
            write = dt[:, t, :, None, None] * values[:, t, :, :, None] * keys[:, t, :, None]
            S = (dt[:, t] * A).exp()[..., None, None] * S + write
            y = (S * queries[:, t, :, None]).sum(-1)
            outputs.append(y if D is None else y + D[:, None] * values[:, t])
        out = torch.stack(outputs, 1).to(x.dtype)
        return (out, S) if return_final_states else out

    install(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    return calls


@pytest.fixture
def mamba_norm(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """``mamba_ssm.ops.triton.layernorm_gated``: gate and norm in the order that is asked for, a norm for each ``group_size`` channels."""
    calls: Calls = []

    def rmsnorm_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None = None,
        eps: float = 1e-6,
        group_size: int | None = None,
        norm_before_gate: bool = True,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        u = x.to(wide)
        assert z is not None
        assert z.shape == x.shape
        gate = F.silu(z.to(wide))
        u = u if norm_before_gate else u * gate
        size = x.shape[-1] if group_size is None else group_size
        grouped = u.unflatten(-1, (-1, size))
        u = (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight.to(wide)
        calls.append({"group_size": group_size})
        return (u * gate if norm_before_gate else u).to(x.dtype)

    install(monkeypatch, "mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=rmsnorm_fn)
    return calls


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """``fla.ops.simple_gla``: ``chunk_simple_gla`` with fla's own naive recurrence inside where it is installed, its sequences one after another."""
    calls: Calls = []
    naive = pytest.importorskip("fla.ops.simple_gla.naive").naive_recurrent_simple_gla

    def chunk_simple_gla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        state_v_first: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert g is not None
        assert q.shape == k.shape
        assert q.shape[:3] == v.shape[:3] == g.shape
        assert q.dtype == k.dtype == v.dtype
        assert g.dtype in (torch.float32, torch.float64)
        assert initial_state is not None
        assert not torch.is_autocast_enabled("cpu")
        calls.append({"q": tuple(q.shape), "scale": scale, "cu_seqlens": cu_seqlens, "dtype": v.dtype})
        # The naive form computes in float32; state and output are held against that.
        if cu_seqlens is None:
            assert initial_state.shape == (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
            y, S = naive(q, k, v, g, scale, initial_state, True)
            return y, S
        assert q.shape[0] == 1
        assert cu_seqlens.dtype == torch.int64
        assert initial_state.shape[0] == len(cu_seqlens) - 1
        ends = cu_seqlens.tolist()
        assert (ends[0], ends[-1]) == (0, q.shape[1])
        outputs, states = [], []
        for n, (i, j) in enumerate(itertools.pairwise(ends)):
            y, S = naive(*(t[:, i:j] for t in (q, k, v, g)), scale, initial_state[n : n + 1], True)
            outputs.append(y)
            states.append(S)
        return torch.cat(outputs, 1), torch.cat(states)

    install(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    return calls


@pytest.fixture
def causal_conv1d(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """``causal_conv1d``: channels first in shape, last in memory, with what its C++ checks of strides, types and taps, and of the gradient's strides."""
    calls: Calls = []

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            if dy.stride(1) != 1:
                dy = dy.transpose(-1, -2).contiguous().transpose(-1, -2)
            assert dy.stride(2) % 8 == dy.stride(0) % 8 == 0, "requires strides (dout.stride(0) and dout.stride(2))"
            return dy

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        (batch, dim, _), taps = x.shape, weight.shape[1]
        assert activation in (None, "silu", "swish")
        assert x.stride(1) == 1
        assert x.stride(2) > 1
        assert dim % 8 == 0
        assert x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert x.data_ptr() % 16 == 0
        assert 2 <= taps <= 4
        assert weight.shape == (dim, taps)
        assert bias is None or (bias.dtype == weight.dtype and bias.shape == (dim,))
        assert seq_idx is None
        assert not return_final_states
        if initial_states is not None:
            assert initial_states.shape == (batch, dim, taps - 1)
            assert (initial_states.dtype, initial_states.stride(1)) == (x.dtype, 1)
        calls.append({"shape": tuple(x.shape), "dtype": x.dtype, "weight": weight.dtype})
        wide = torch.promote_types(x.dtype, torch.float32)
        before = x.new_zeros(batch, dim, taps - 1) if initial_states is None else initial_states
        padded = torch.cat([before, x], 2).to(wide)
        y = F.conv1d(padded, weight.to(wide)[:, None], None if bias is None else bias.to(wide), groups=dim)
        y = (y if activation is None else F.silu(y)).to(x.dtype)
        return Checked.apply(y.transpose(1, 2).contiguous().transpose(1, 2))

    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    return calls
