"""Linear attention by packages for GPUs: translated arguments held against stand-ins, and who is taken when; none of it needs a GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers import create_mixer
from mmlong.ops import linear_attention_backends as module
from mmlong.ops import linear_attention_whole as forms
from mmlong.ops.backends import HALVES, BackendError, Request
from mmlong.ops.linear_attention import scalar_decay_attention, scalar_decay_reference
from mmlong.ops.linear_attention_backends import LINEAR_ATTENTION, document_starts, preferred

Here = Callable[[Any, str], None]
VENDORS = ("mamba_ssm", "fla")


def make(B: int, L: int, H: int, G: int, N: int, P: int, dtype: torch.dtype) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(100 * B + L + H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, dtype=torch.float64)

    inputs = {
        "q": normal(B, L, G, N),
        "k": normal(B, L, G, N) / math.sqrt(N),
        "v": normal(B, L, H, P),
        "log_input": normal(B, L, H) - 1,
        "log_rate": normal(H) / 2,
        "skip": normal(H),
        "state": normal(B, H, P, N),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}


def call(inputs: dict[str, Tensor], backend: str, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
    """Decays as Mamba-2 has them, from their parameters, so that gradients meet there by whatever way they come."""
    rate = -inputs["log_rate"].exp()
    g = rate * inputs["log_input"].exp()
    q, k, v, log_input, skip, state = (inputs[n] for n in ("q", "k", "v", "log_input", "skip", "state"))
    if backend == "definition":
        return scalar_decay_reference(q, k, v, g, log_input, skip, state, layout)
    return scalar_decay_attention(q, k, v, g, log_input, skip, state, layout, rate=rate, backend=backend)


def compare(inputs: dict[str, Tensor], backend: str, layout: Layout | None = None, rtol: float = 1e-4) -> None:
    B, L = inputs["v"].shape[:2]
    valid = None if layout is None else layout.valid(L)
    keep = torch.ones(B, L, dtype=torch.bool) if valid is None else valid
    r = torch.Generator().manual_seed(7)
    found = []
    for name in (backend, "definition"):
        y, state = call(inputs, name, layout)
        y = torch.where(keep[..., None, None], y, 0)
        r.manual_seed(7)
        along = [torch.randn(t.shape, generator=r, dtype=t.dtype) for t in (y, state)]
        gradients = torch.autograd.grad([y, state], list(inputs.values()), along)
        found.append([y, state, *gradients])
    for name, mine, theirs in zip(("y", "state", *inputs), *found, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name} by {backend}: {text}"
        )


@pytest.mark.parametrize("sizes", [(1, 33, 4, 2, 6, 4), (3, 17, 2, 1, 4, 6), (2, 1, 3, 3, 4, 2)])
@pytest.mark.parametrize("vendor", VENDORS)
def test_value_state_and_gradients(
    vendor: str, sizes: tuple[int, ...], here: Here, request: pytest.FixtureRequest
) -> None:
    calls = request.getfixturevalue(vendor)
    here(LINEAR_ATTENTION, vendor)
    compare(make(*sizes, torch.float32), vendor)
    assert len(calls) == 1, "the package was asked, once"


@pytest.mark.parametrize("vendor", VENDORS)
def test_lengths_and_resets(vendor: str, here: Here, request: pytest.FixtureRequest) -> None:
    calls = request.getfixturevalue(vendor)
    here(LINEAR_ATTENTION, vendor)

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        B, L = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        some = st.lists(st.integers(0, L), min_size=B, max_size=B)
        lengths = torch.tensor(data.draw(some)) if data.draw(st.booleans()) else None
        flags = data.draw(st.lists(st.booleans(), min_size=B * L, max_size=B * L))
        compare(make(B, L, 2, 1, 2, 4, torch.float32), vendor, Layout(lengths, torch.tensor(flags).view(B, L)))

    check()
    assert calls


@pytest.mark.parametrize("vendor", VENDORS)
def test_pieces_with_the_state_carried(vendor: str, here: Here, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(vendor)
    here(LINEAR_ATTENTION, vendor)
    inputs = make(2, 20, 2, 1, 4, 2, torch.float32)
    whole, last = call(inputs, "definition")
    parts, state = [], inputs["state"]
    for i, j in ((0, 7), (7, 8), (8, 20)):
        piece = {n: t[:, i:j] if n in ("q", "k", "v", "log_input") else t for n, t in inputs.items()}
        y, state = call(piece | {"state": state}, vendor)
        parts.append(y)
    torch.testing.assert_close((torch.cat(parts, 1), state), (whole, last), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vendor", VENDORS)
def test_half_precision_goes_in_and_comes_out(vendor: str, here: Here, request: pytest.FixtureRequest) -> None:
    calls = request.getfixturevalue(vendor)
    here(LINEAR_ATTENTION, vendor)
    inputs = make(2, 9, 2, 1, 4, 4, torch.float32)
    low = {n: t.detach().bfloat16().requires_grad_() if n in ("q", "k", "v") else t for n, t in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, state = call(low, vendor)
    assert (y.dtype, state.dtype, calls[0]["dtype"]) == (torch.bfloat16, torch.float32, torch.bfloat16)
    want, want_state = call({n: t.double() for n, t in low.items()}, "definition")
    torch.testing.assert_close(y.double(), want, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(state.double(), want_state, rtol=3e-2, atol=3e-2)
    gradients = torch.autograd.grad(y.float().sum() + state.sum(), list(low.values()))
    assert [g.dtype for g in gradients] == [t.dtype for t in low.values()]


def test_fla_has_no_input_scale_of_its_own_and_no_groups(fla: list[dict[str, Any]], here: Here) -> None:
    here(LINEAR_ATTENTION, "fla")
    inputs = make(2, 9, 4, 2, 3, 4, torch.float32)
    g = -inputs["log_input"].exp()
    args = (inputs["q"], inputs["k"], inputs["v"], g)
    # Neither input scale, skip nor state.
    got = scalar_decay_attention(*args, backend="fla")
    torch.testing.assert_close(got, scalar_decay_reference(*args), rtol=1e-4, atol=1e-5)
    assert fla == [{"q": (2, 9, 4, 3), "scale": 1.0, "cu_seqlens": None, "dtype": torch.float32}]


def test_documents_as_fla_and_mamba_ssm_count_them(
    fla: list[dict[str, Any]], mamba_ssm: list[dict[str, Any]], here: Here
) -> None:
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[0, 4] = resets[1, 0] = resets[1, 7] = True
    bounds, first, last = document_starts(resets.long().cumsum(1))
    assert (bounds.tolist(), first.tolist(), last.tolist()) == ([0, 4, 9, 16, 18], [0, 2], [1, 3])
    for vendor in VENDORS:
        here(LINEAR_ATTENTION, vendor)
        # The second row ends at 7: the document that would begin there has not begun.
        call(make(2, 9, 2, 1, 2, 2, torch.float32), vendor, Layout(torch.tensor([9, 7]), resets))
    assert fla[0]["cu_seqlens"].tolist() == [0, 4, 9, 18]
    assert mamba_ssm[0]["seq_idx"].tolist() == [[0] * 4 + [1] * 5, [1] * 9]
    assert mamba_ssm[0]["chunk_size"] == 256


def test_mamba2_hands_its_rate_on(monkeypatch: pytest.MonkeyPatch, mamba_ssm: Any, here: Here) -> None:
    """The mixer as it is on a GPU, where it runs plain torch in one piece but for the recurrence."""
    here(LINEAR_ATTENTION, "mamba_ssm")
    torch.manual_seed(0)
    mixer = create_mixer("mamba2", 8, backend="mamba_ssm")
    x = torch.randn(2, 11, 8)
    with pytest.raises(BackendError, match="give rate"):
        mixer(x)  # on a CPU it hands none on
    layout = Layout(torch.tensor([11, 6]), torch.rand(2, 11) < 0.2)
    want = [*_both(create_mixer_like(mixer, "auto"), x, layout)]
    rate = -mixer.A_log.exp()
    plain = scalar_decay_attention

    def rated(*args: Any, **options: Any) -> Any:
        return plain(*args, **options | {"rate": rate})

    monkeypatch.setattr("mmlong.mixers.mamba2.scalar_decay_attention", rated)
    got = [*_both(mixer, x, layout)]
    assert mamba_ssm
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def create_mixer_like(mixer: Any, backend: str) -> Any:
    other = create_mixer("mamba2", mixer.dim, backend=backend)
    other.load_state_dict(mixer.state_dict())
    return other


def _both(mixer: Any, x: Tensor, layout: Layout) -> list[Tensor]:
    y, state = mixer(x, None, layout)
    y = y * layout.valid(x.shape[1])[..., None]
    return [y, *state.values(), *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))]


def test_an_unknown_backend_is_refused_when_the_mixer_is_made() -> None:
    with pytest.raises(
        BackendError, match="linear_attention has no backend 'fal'; it has: auto, mamba_ssm, fla, portable"
    ):
        create_mixer("mamba2", 8, backend="fal")


def test_rate_needs_its_shape_and_its_input_scale() -> None:
    i = make(1, 5, 2, 1, 2, 2, torch.float32)
    g = -i["log_input"].exp()
    with pytest.raises(ValueError, match=r"rate is \(3,\), expected \(H,\) = \(2,\), beside log_input"):
        scalar_decay_attention(i["q"], i["k"], i["v"], g, i["log_input"], rate=torch.ones(3))
    with pytest.raises(ValueError, match="beside log_input"):
        scalar_decay_attention(i["q"], i["k"], i["v"], g, rate=torch.ones(2))


# Who is taken

SIZES = {"batch": 8, "length": 16384, "heads": 16, "groups": 1, "values": 64, "keys": 64, "span": 1 << 28, "rated": 1}


def asked(dtype: torch.dtype = torch.bfloat16, mask: str = "", backward: bool = True, **sizes: int) -> Request:
    return Request("cuda", dtype, mask, backward=backward, sizes={**SIZES, **sizes})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_package", lambda modules, extra: (True, "installed"))


def taken(request: Request) -> str:
    return LINEAR_ATTENTION.choose(request, "auto", preferred(request)).name


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (asked(), "mamba_ssm"),
        (asked(mask="resets"), "mamba_ssm"),
        (asked(torch.float16), "mamba_ssm"),
        (asked(rated=0), "fla"),
        (asked(span=1 << 31), "fla"),
        (asked(batch=1, length=1 << 25), "fla"),
        (asked(batch=64, length=1 << 17, heads=64), "fla"),
        (asked(rated=0, keys=63), "portable"),
        (asked(rated=0, keys=63, backward=False), "fla"),
        (asked(rated=0, batch=8192), "portable"),
        (asked(rated=0, batch=8192, mask="resets"), "fla"),
        (asked(torch.float32), "portable"),
        (asked(torch.float64), "portable"),
        (Request("cpu", torch.bfloat16, sizes=SIZES), "portable"),
    ],
)
def test_auto(request_: Request, name: str) -> None:
    assert taken(request_) == name


@pytest.mark.usefixtures("installed")
def test_float32_takes_tf32_kernels_only_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert taken(asked(torch.float32)) == "mamba_ssm"
    assert taken(asked(torch.float64)) == "portable"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "request_", "reason"),
    [
        ("mamba_ssm", asked(rated=0), "a rate a head times the input scale"),
        (
            "mamba_ssm",
            asked(span=1 << 31),
            r"counts elements in 32 bits, and here there are 2\^31 or more: train in segments",
        ),
        ("mamba_ssm", asked(batch=1, length=1 << 25), "65,535 chunks of 256 tokens at most, not 131,072"),
        ("mamba_ssm", asked(torch.float64), "takes bfloat16, float16, float32, not float64"),
        ("fla", asked(values=5), "even head widths only, not keys of 64 and values of 5"),
        ("fla", asked(heads=70000, batch=1), "65,535 rows of heads at most, not 70,000"),
        ("fla", Request("cpu", torch.bfloat16, sizes=SIZES), "runs on cuda only, the tensors are on cpu"),
    ],
)
def test_a_named_one_that_cannot_says_why(name: str, request_: Request, reason: str) -> None:
    with pytest.raises(BackendError, match=f"linear_attention: backend '{name}' .*{reason}"):
        LINEAR_ATTENTION.choose(request_, name)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("triton", "capability", "wrong"),
    [("3.4.0", 9, True), ("3.7.0", 9, True), ("3.7.1", 9, False), ("3.8.0+git", 9, False), ("3.5.0", 8, False)],
)
def test_fla_on_hopper_needs_a_triton_that_is_right(
    monkeypatch: pytest.MonkeyPatch, triton: str, capability: int, wrong: bool
) -> None:
    package = pytest.importorskip("triton")
    monkeypatch.setattr(package, "__version__", triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    assert (LINEAR_ATTENTION["fla"].refusal(asked()) is not None) == wrong
    assert LINEAR_ATTENTION["fla"].refusal(asked(backward=False)) is None


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmlong.ops import backends

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends.cuda_package.cache_clear()
    try:
        for name, extra in (("mamba_ssm", "mamba-ssm"), ("fla", "gpu")):
            with pytest.raises(BackendError, match=rf"needs {name}, not installed: pip install 'mmlong\[{extra}\]'"):
                LINEAR_ATTENTION.choose(asked(), name)
        assert taken(asked()) == "portable"
    finally:
        backends.cuda_package.cache_clear()


def test_a_package_that_cannot_be_imported_is_an_error_and_not_another_way(
    monkeypatch: pytest.MonkeyPatch, here: Here
) -> None:
    here(LINEAR_ATTENTION, "mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(
        BackendError, match=r"importing it fails: .*Install mamba-ssm anew .*or ask for backend='portable'"
    ):
        call(make(1, 5, 2, 1, 2, 2, torch.float32), "mamba_ssm")


# The portable form of other devices


@pytest.mark.parametrize("resets", [False, True])
def test_stretches_are_the_whole(monkeypatch: pytest.MonkeyPatch, resets: bool) -> None:
    monkeypatch.setattr(forms, "STRETCH_CHUNKS", 3)
    i = make(2, 29, 2, 1, 3, 2, torch.float64)
    leaves = [i[n] for n in ("q", "k", "v", "log_input", "skip", "state")]
    documents = (torch.rand(2, 29) < 0.2).long().cumsum(1) if resets else None
    q, k, v, log_input, skip, state = leaves
    found = []
    for form in (forms.stretches, forms.whole):
        y, after = form(q, k, v, -log_input.exp(), log_input, skip, state, documents, 4)
        gradients = torch.autograd.grad(y.sin().sum() + after.sin().sum(), leaves)
        found.append([y, after, *gradients])
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_stretches_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "STRETCH_CHUNKS", 2)
    i = make(1, 20, 2, 1, 3, 2, torch.float32)
    leaves = [i[n] for n in ("q", "k", "v", "log_input", "skip", "state")]
    q, k, v, log_input, skip, state = leaves
    found = []
    for form in (torch.compile(forms.stretches, backend="aot_eager", fullgraph=True), forms.stretches):
        y, after = form(q, k, v, -log_input.exp(), log_input, skip, state, None, 4)
        found.append([y, after, *torch.autograd.grad(y.sin().sum() + after.sin().sum(), leaves)])
    torch.testing.assert_close(*found)


def test_stretches_hold_no_more_than_one_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: what is saved over and above the inputs and the states does not grow with the length."""
    monkeypatch.setattr(forms, "STRETCH_CHUNKS", 2)

    def saved(L: int) -> int:
        i = make(1, L, 2, 1, 4, 4, torch.float32)
        own = {t.untyped_storage().data_ptr() for t in i.values()}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        g = -i["log_input"].exp().detach()
        own.add(g.untyped_storage().data_ptr())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forms.stretches(i["q"], i["k"], i["v"], g, i["log_input"], i["skip"], i["state"], None, 8)
        return sum(kept.values())

    assert saved(256) < saved(16) + 16 * 2 * 2 * 4 * 4 * 4


def test_half_types_are_all_of_them() -> None:
    assert HALVES < module.TAKEN
