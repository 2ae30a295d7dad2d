"""Every mixer under strong decays, keys and gates in the thousands, in float32 and bfloat16: beside float64, and at 65,536 tokens too.

Where decays are parameters they are set here, from almost none to e^-20 a token and beyond; where the token decides, large tokens do that. Each mixer is in one of two tables, so
that a new one says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.mixers import MIXERS, create_mixer, list_mixers
from mmlong.mixers.document import DocumentMixer
from mmlong.testing import ConformanceError, check_mixer
from mmlong.testing.example import DecayingSum

Logs = Tensor
"""Log decays a token, as the parameters were set to make them."""


def spread(like: Tensor, fastest: float = 20.5, slowest: float = 1e-4) -> Tensor:
    """Log decays of a parameter's shape, from ``-slowest`` to ``-fastest``, evenly in the logarithm; a single one is the fastest."""
    n = like.numel()
    logs = torch.linspace(math.log(fastest), math.log(slowest), n, dtype=torch.float64).exp()
    return -logs.view(like.shape).to(like)


def rate(m: Any) -> Logs:
    """``A_log``: the decay of a token whose step is one."""
    decays = spread(m.A_log)
    m.A_log.copy_((-decays).log())
    return decays


def ways(m: Any) -> Logs:
    """VMamba's four."""
    return torch.cat([rate(way) for way in m.ways])


def diagonal(m: Any) -> Logs:
    """``dt A`` of S4D and S4ND."""
    decays = spread(m.log_A_real)
    m.log_A_real.copy_((-decays).log() - m.log_dt[..., None])
    return -m.log_dt.exp()[..., None] * m.log_A_real.exp()


def bilinear_steps(m: Any) -> None:
    x = -spread(m.log_A_real, 100.0)
    x[:, 0] = 2.0
    m.log_A_real.copy_(x.log() - m.log_dt[:, None])
    m.A_imag[:, 0] = 1e-9  # a mode of nothing at all has no angle


def bilinear(m: Any) -> Logs:
    """``dt A`` of H3: real modes from 1 through 0 to -1, of which those around ``dt A = -2`` forget at once."""
    bilinear_steps(m)
    return m.discretise(torch.float64)[0][..., 0]


def structured(m: Any) -> Logs:
    """S4, bilinear as H3; in its first channel without the term of rank one, which would move the mode that forgets at once."""
    bilinear_steps(m)
    m.P[0] = 0
    return torch.linalg.eigvals(m.discretise(torch.float64).transition()).abs().log()


def modes(m: Any) -> Logs:
    m.nu_log.copy_((-spread(m.nu_log)).log())
    return -m.nu_log.exp()


def steps(m: Any) -> Logs:
    m.Lambda_re.copy_(spread(m.Lambda_re) / m.log_step.exp())
    return m.Lambda_re * m.log_step.exp()


def fixed(m: Any) -> Logs:
    """Lightning's and RetNet's decays are constants a head; here they are others."""
    m.log_decay.copy_(spread(m.log_decay))
    return m.log_decay


def average(m: Any) -> Logs:
    """Mega's ``1 - sigmoid(delta) sigmoid(alpha)``, which its ``FASTEST`` keeps above e^-14."""
    m.delta.fill_(20.0)
    m.alpha.copy_(torch.linspace(20, -8, m.alpha.numel()).view_as(m.alpha))
    return torch.log1p(-(torch.sigmoid(m.delta.double()) * torch.sigmoid(m.alpha.double())))


def griffin(m: Any) -> Logs:
    """RG-LRU's ``-8 softplus(Lambda)`` of a gate that is open."""
    m.Lambda.copy_(torch.expm1(-spread(m.Lambda) / 8).log())
    return -8 * F.softplus(m.Lambda)


def exponentials(m: Any) -> Logs:
    """The rates of StripedHyena 2's long filters."""
    p = m.filter.log_rate
    p.copy_((-spread(p)).log())
    return -p.exp()


def channels(name: str) -> Callable[[Any], Logs]:
    """RWKV's ``-exp(parameter)``."""

    def set_(m: Any) -> Logs:
        p = getattr(m, name)
        p.copy_((-spread(p)).log())
        return -p.exp()

    return set_


SET: dict[str, Callable[[Any], Logs]] = {
    "gated_deltanet": rate,
    "h3": bilinear,
    "hydra": rate,
    "kda": rate,
    "lightning": fixed,
    "log_linear": rate,
    "lru": modes,
    "mamba": rate,
    "mamba2": rate,
    "mega": average,
    "retnet": fixed,
    "rg_lru": griffin,
    "rwkv4": channels("decay"),
    "rwkv6": channels("decay_base"),
    "s4": structured,
    "s4d": diagonal,
    "s4nd": diagonal,
    "s5": steps,
    "stripedhyena2": exponentials,
    "vmamba": ways,
}
"""Mixers whose decays are parameters, at least in part."""

BY_TOKEN = "a gate that the token decides, of which large tokens make anything from none to all"
NONE = "there is no decay"
DRIVEN: dict[str, str] = {
    "hardcoded_gaussian": NONE,
    "mixer_mlp": NONE,
    "gmlp": NONE,
    "poolingformer": NONE,
    "long_short": NONE,
    "h_transformer": NONE,
    "abc": "a slot's decay is the share of the past in its sum of exponentials, which the tokens decide",
    "aft_simple": NONE,
    "dsa": NONE,
    "moba": NONE,
    "nsa": NONE,
    "topk": NONE,
    "bigbird": NONE,
    "dilated": NONE,
    "etc": NONE,
    "longformer": NONE,
    "sparse_fixed": NONE,
    "transformer_xl": NONE,
    "infini_attention": NONE,
    "block_recurrent": NONE,
    "memorizing": NONE,
    "compressive": NONE,
    "sparse_strided": NONE,
    "adaptive_span": NONE,
    "expire_span": "a span that the token decides, of which large tokens make anything from none to all",
    "attention": NONE,
    "axial": NONE,
    "axial_decoder": NONE,
    "image_local_1d": NONE,
    "image_local_2d": NONE,
    "neighborhood_2d": NONE,
    "neighborhood_3d": NONE,
    "swin_2d": NONE,
    "based": NONE,
    "diff_attention": NONE,
    "forgetting_attention": BY_TOKEN,
    "mla": NONE,
    "clusterformer": NONE,
    "deltanet": "what a token erases of its key's direction, by a rate that it decides",
    "gla": BY_TOKEN,
    "gru": BY_TOKEN,
    "gsa": BY_TOKEN,
    "hgrn": BY_TOKEN,
    "hgrn2": BY_TOKEN,
    "hyena": "filters fade over thousands of tokens, by constants",
    "linear_transformer": NONE,
    "local": NONE,
    "long_conv": "filters are free",
    "lstm": BY_TOKEN,
    "mamba3": BY_TOKEN,
    "masked_conv2d": NONE,
    "masked_conv3d": NONE,
    "efficient_attention": NONE,
    "fnet": NONE,
    "linformer": NONE,
    "luna": NONE,
    "memory_compressed": NONE,
    "nystromformer": NONE,
    "set_transformer": NONE,
    "synthesizer_dense": NONE,
    "synthesizer_random": NONE,
    "xcit": NONE,
    "min_gru": BY_TOKEN,
    "min_lstm": BY_TOKEN,
    "mlstm": "a gate that the token decides, whose argument its mechanism caps at 15",
    "performer": NONE,
    "reformer": NONE,
    "rfa": BY_TOKEN,
    "routing": NONE,
    "rwkv4_channel": NONE,
    "rwkv7": "its mechanism has none faster than e^-0.61",
    "sgconv": "filters fade over whole scales, by constants",
    "sinkhorn": NONE,
    "tcn": NONE,
    "titans": BY_TOKEN,
    "ttt_linear": NONE,
    "ttt_mlp": NONE,
}
"""Mixers without such parameters, and why."""

BOUNDED = {"mega": -13.0}
"""Where a mechanism's fastest decay is slower than e^-20, as its file says."""


SEQUENTIAL = {"gru", "lstm"}
"""Torch's own loops over the tokens, a quarter of an hour of them: there are no chunks whose joints a longer sequence could show."""

CHAOTIC = {
    "ttt_mlp": "its inner steps are in the square of the keys: of tokens in the thousands, gradients grow by 1e30 over 60,000 and overflow float32"
}
"""What cannot be asked of 65,536 tokens, as the mechanism's file says."""


LONGEST = (
    "gla", "hyena", "kda", "local", "log_linear", "mamba", "mamba2", "mega", "mlstm", "performer", "retnet", "rg_lru", "rwkv4", "rwkv6", "rwkv7",
    "s4", "s4d", "s5", "stripedhyena2", "titans", "ttt_mlp",
)  # fmt: skip
"""One or two mixers over each op that joins chunks by states: how joints fare over 65,536 tokens is the op's affair, and a run of all mixers takes ten minutes (``at_length`` says of which it could say anything)."""


def strong(name: str) -> Callable[[nn.Module], None] | None:
    """What sets the decays of a mixer."""
    setting = SET.get(name)
    if setting is None:
        return None

    def prepare(m: nn.Module) -> None:
        with torch.no_grad():
            setting(m)

    return prepare


def at_length(name: str) -> bool:
    """Whether 65,536 tokens can say more than 1,037 do."""
    kind = MIXERS[name]
    # Attention over what a pattern or a selection lists has neither decays nor chunks that states join: as exact at any length.
    listed = issubclass(kind, DocumentMixer) and name not in SET
    return kind.traits.cost != "n^2" and name not in SEQUENTIAL and not listed and name in LONGEST


def forms() -> list[Any]:
    """(name, causal)."""
    found = []
    for name in list_mixers():
        if MIXERS[name].__module__.startswith("mmlong.mixers."):
            traits = MIXERS[name].traits
            found += [(name, causal) for causal in (True, False) if (traits.causal if causal else traits.bidirectional)]
    return [pytest.param(*form, id=f"{form[0]}-{'causal' if form[1] else 'two-sided'}") for form in found]


def test_every_mixer_is_in_one_table() -> None:
    names = {form.values[0] for form in forms()}
    assert set(SET) | set(DRIVEN) == names
    assert not set(SET) & set(DRIVEN)


@pytest.mark.parametrize("name", list(SET))
def test_decays_are_set_from_almost_none_to_strong(name: str) -> None:
    """At the widths that are used; a decay that every head shares is a strong one."""
    torch.manual_seed(0)
    m = create_mixer(name, 32)
    with torch.no_grad():
        logs = SET[name](m)
    assert float(logs.min()) < BOUNDED.get(name, -20.0)
    if logs.numel() > 1:
        assert float(logs.max()) > -0.01


@pytest.mark.parametrize(("name", "causal"), forms())
def test_near_float64(name: str, causal: bool) -> None:
    assert check_mixer(name, options={"causal": causal}, only="stress", dims=(32,), prepare=strong(name))


# Not those that look at all pairs: a quarter of an hour of them says no more than 1,037 tokens do.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal"), [p for p in forms() if at_length(p.values[0])])
def test_near_float64_at_65536_tokens(name: str, causal: bool) -> None:
    if name in CHAOTIC:
        # Should it hold one day, this says so.
        with pytest.raises(ConformanceError, match="gradient of the inputs: (nan|-?inf) "):
            check_mixer(name, options={"causal": causal}, only="long stress", dims=(16,), prepare=strong(name))
        return
    options = {"causal": causal}
    assert check_mixer(name, options=options, only="long stress", dims=(16,), prepare=strong(name))


class Divided(DecayingSum):
    """Its chunks divide by products of decays, which strong ones make zero."""

    def recur(self, v, h, layout):
        decays = torch.sigmoid(self.decay)
        if layout is not None or v.shape[1] == 1 or self.decay.dtype == torch.float64:
            return super().recur(v, h, layout)
        products = decays ** torch.arange(1, 9, device=v.device)[:, None]
        out = []
        for chunk in v.split(8, 1):
            n = chunk.shape[1]
            chunk = products[:n] * (h[:, None] + (chunk / products[:n]).cumsum(1))
            h = chunk[:, -1]
            out.append(chunk)
        return torch.cat(out, 1), h


def test_what_divides_by_decays_is_refused_once_they_are_strong() -> None:
    def prepare(m: Any) -> None:
        m.decay.fill_(-20.0)

    assert check_mixer(Divided, only="stress", dims=(16,))
    assert check_mixer(DecayingSum, only="stress", dims=(16,), prepare=prepare)
    with pytest.raises(ConformanceError) as caught:
        check_mixer(Divided, only="stress", dims=(16,), prepare=prepare)
    assert caught.value.property == "stress"
