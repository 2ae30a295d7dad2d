"""Short convolution and gated norm by packages for GPUs: held against stand-ins that check what the kernels check; none of it needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlong.layout import Layout
from mmlong.ops import gated_norm_backends, short_conv_backends
from mmlong.ops.backends import BackendError, Request, span
from mmlong.ops.gated_norm import gated_rms_norm, gated_rms_norm_reference
from mmlong.ops.gated_norm_backends import GATED_NORM
from mmlong.ops.short_conv import short_conv, short_conv_reference
from mmlong.ops.short_conv_backends import SHORT_CONV, preferred

Here = Callable[[Any, str], None]
Calls = list[dict[str, Any]]


@pytest.fixture
def conv(causal_conv1d: Calls, here: Here) -> Calls:
    here(SHORT_CONV, "causal_conv1d")
    return causal_conv1d


def make(B: int, L: int, D: int, K: int) -> list[Tensor]:
    r = torch.Generator().manual_seed(B * 1000 + L)
    shapes = [(B, L, D), (D, K), (D,), (B, K - 1, D)]
    return [torch.randn(s, generator=r, dtype=torch.float64).requires_grad_() for s in shapes]


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want)
    along = [torch.randn_like(t) for t in want]
    mine, theirs = (torch.autograd.grad(t, leaves, along, retain_graph=True) for t in (got, want))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("B", "L", "K"), [(1, 33, 4), (3, 17, 3), (2, 4, 4), (2, 5, 2)])
def test_value_tail_and_gradients(conv: Calls, B: int, L: int, K: int, activation: Any) -> None:
    x, w, b, tail = make(B, L, 16, K)
    got = short_conv(x, w, b, tail, None, activation, "causal_conv1d")
    same(got, short_conv_reference(x, w, b, tail, activation), [x, w, b, tail])
    assert [c["shape"] for c in conv] == [(B, 16, L)]


def test_without_bias_and_past(conv: Calls) -> None:
    x, w, _, _ = make(2, 9, 8, 4)
    same(short_conv(x, w, backend="causal_conv1d"), short_conv_reference(x, w), [x, w])
    assert conv


def test_padded_rows(conv: Calls) -> None:
    x, w, b, tail = make(3, 12, 8, 4)
    layout = Layout(torch.tensor([12, 5, 0]))
    y, after = short_conv(x, w, b, tail, layout, "silu", "causal_conv1d")
    want, want_after = short_conv(x, w, b, tail, layout, "silu")
    same((y * layout.valid(12)[..., None], after), (want * layout.valid(12)[..., None], want_after), [x, w, b, tail])
    assert conv


@pytest.mark.parametrize("what", ["sliced", "turned", "shifted", "one row"])
def test_inputs_and_gradients_laid_out_otherwise_are_copied(conv: Calls, what: str) -> None:
    """The stand-in's checks of strides are those of the kernel."""
    x, w, b, tail = make(2, 9, 8, 4)
    laid = {
        "sliced": lambda t: torch.cat([t, t[..., :3]], 2)[..., :8],
        "turned": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "shifted": lambda t: torch.cat([t[..., :4], t, t[..., :4]], 2)[..., 1:9],
        "one row": lambda t: torch.cat([t, t[:, :, :1]], 2).flatten(1)[:1, : 9 * 9].unflatten(1, (9, 9))[..., :8],
    }[what](x)
    got = short_conv(laid, w, b, tail[: laid.shape[0]], None, "silu", "causal_conv1d")
    want = short_conv_reference(laid, w, b, tail[: laid.shape[0]], "silu")
    torch.testing.assert_close(got, want)
    # What is joined to something else gets a gradient whose rows are apart by what is no multiple of 8.
    beside = laid.detach()[..., :3]
    (mine,) = torch.autograd.grad(torch.cat([got[0], beside], 2).sin().sum(), x)
    (theirs,) = torch.autograd.grad(torch.cat([want[0], beside], 2).sin().sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_half_precision_keeps_float32_weights(conv: Calls) -> None:
    x, w, b, tail = (t.detach().float() for t in make(2, 9, 8, 4))
    low, tail = x.bfloat16().requires_grad_(), tail.bfloat16().float()
    y, after = short_conv(low, w, b, tail, None, "silu", "causal_conv1d")
    want, want_after = short_conv(low, w, b, tail, None, "silu")
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert (conv[0]["dtype"], conv[0]["weight"]) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close((y, after), (want, want_after))


def test_what_the_kernel_cannot_do_is_an_error_by_name_and_portable_by_itself(conv: Calls) -> None:
    x, w, b, tail = make(2, 9, 8, 4)
    resets = torch.zeros(2, 9, dtype=torch.bool)
    with pytest.raises(BackendError, match="short_conv: backend 'causal_conv1d' has no mask of the kind 'resets'"):
        short_conv(x, w, b, tail, Layout(resets=resets), "silu", "causal_conv1d")
    with pytest.raises(BackendError, match="takes pieces at least as long as the 4 taps, not 3 tokens"):
        short_conv(x[:, :3], w, b, tail, None, "silu", "causal_conv1d")
    assert not conv


def asked(dtype: torch.dtype = torch.bfloat16, mask: str = "", device: str = "cuda", **sizes: int) -> Request:
    known = {"length": 1000, "channels": 256, "taps": 4, "span": 1 << 20}
    return Request(device, dtype, mask, sizes={**known, **sizes})


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (asked(), "causal_conv1d"),
        (asked(torch.float32), "causal_conv1d"),
        (asked(torch.float64), "portable"),
        (asked(mask="resets"), "portable"),
        (asked(channels=252), "portable"),
        (asked(taps=5), "portable"),
        (asked(taps=1), "portable"),
        (asked(length=1), "portable"),
        (asked(span=1 << 31), "portable"),
        (asked(device="cpu"), "portable"),
        (asked(device="mps"), "portable"),
    ],
)
def test_auto(monkeypatch: pytest.MonkeyPatch, request_: Request, name: str) -> None:
    monkeypatch.setattr(short_conv_backends, "cuda_package", lambda modules, extra: (True, "installed"))
    assert SHORT_CONV.choose(request_, "auto", preferred(request_)).name == name


# Gated norm


@pytest.mark.parametrize("groups", [1, 4])
def test_norm_value_and_gradients(mamba_norm: Calls, here: Here, groups: int) -> None:
    here(GATED_NORM, "mamba_ssm")
    r = torch.Generator().manual_seed(3)
    y, z = (torch.randn(3, 5, 8, generator=r, dtype=torch.float64).requires_grad_() for _ in range(2))
    w = torch.randn(8, generator=r, dtype=torch.float64).requires_grad_()
    got = gated_rms_norm(y, z, w, groups, 1e-3, "mamba_ssm")
    same((got,), (gated_rms_norm_reference(y, z, w, groups, 1e-3),), [y, z, w])
    assert mamba_norm == [{"group_size": 8 // groups}]


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (Request("cuda", torch.bfloat16, sizes={"bytes": 1024, "span": 1 << 20}), "mamba_ssm"),
        (Request("cuda", torch.float32, sizes={"bytes": 1 << 17, "span": 1 << 20}), "portable"),
        (Request("cuda", torch.float32, sizes={"bytes": 1024, "span": 1 << 31}), "portable"),
        (Request("cpu", torch.float32, sizes={"bytes": 1024, "span": 1 << 20}), "portable"),
    ],
)
def test_norm_auto(monkeypatch: pytest.MonkeyPatch, request_: Request, name: str) -> None:
    monkeypatch.setattr(gated_norm_backends, "cuda_package", lambda modules, extra: (True, "installed"))
    assert GATED_NORM.choose(request_, "auto", gated_norm_backends.preferred(request_)).name == name


def test_norm_on_a_cpu_by_name_says_why() -> None:
    t = torch.randn(2, 8)
    with pytest.raises(BackendError, match="gated_norm: backend 'mamba_ssm' runs on cuda only, the tensors are on cpu"):
        gated_rms_norm(t, t, t[0], backend="mamba_ssm")


def test_span_counts_from_first_to_last() -> None:
    x = torch.zeros(4, 5, 6)
    assert span(x) == 120
    assert span(x[:2, ::2, 1:3]) == 30 + 2 * 12 + 1 + 1
    assert span(x[:0], x[0]) == 30
    assert span(x[:0]) == 0
