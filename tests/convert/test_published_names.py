"""HyenaDNA and Caduceus, which have no class in transformers: state dicts of their published names and shapes, held against their formulas written out here by those names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlong.convert import ConvertError, convert
from mmlong.models import load_model

Tensors = dict[str, Tensor]

D, LAYERS, LONGEST = 16, 2, 48
HYENA: dict[str, Any] = {
    "model_type": "hyenadna", "architectures": ["HyenaDNAForCausalLM"], "vocab_size": 12, "d_model": D, "d_inner": 40, "n_layer": LAYERS,
    "max_seq_len": LONGEST, "emb_dim": 5, "filter_order": 8, "num_inner_mlps": 2, "hyena_order": 2, "short_filter_order": 3, "train_freq": True,
    "layer_norm_epsilon": 1e-5, "pad_vocab_size_multiple": 8, "use_bias": False, "pad_token_id": 4,
}  # fmt: skip
CADUCEUS: dict[str, Any] = {
    "model_type": "caduceus", "architectures": ["CaduceusForMaskedLM"], "vocab_size": 12, "d_model": D, "n_layer": LAYERS, "rms_norm": True, "norm_epsilon": 1e-5,
    "ssm_cfg": {"d_state": 5, "d_conv": 4, "expand": 2, "dt_rank": "auto", "bias": False, "conv_bias": True, "use_fast_path": True},
    "bidirectional": True, "bidirectional_strategy": "add", "bidirectional_weight_tie": True, "rcps": False, "pad_vocab_size_multiple": 8,
}  # fmt: skip


def drawn(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    r = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=r) for name, shape in shapes.items()}


def hyena_features() -> Tensors:
    t = torch.arange(LONGEST) / (LONGEST - 1)
    angles = [2 * math.pi * torch.arange(LONGEST) / LONGEST * f for f in (1e-4, 1.0)]
    z = torch.stack([t, *(a.cos() for a in angles), *(-a.sin() for a in angles)], -1)
    deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, D)
    return {"pos_emb.z": z[None], "pos_emb.t": t[None, :, None], "modulation.deltas": deltas[None, None]}


def hyena_tensors() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"hyena.backbone.embeddings.word_embeddings.weight": (16, D)}
    for i in range(LAYERS):
        at = f"hyena.backbone.layers.{i}"
        sizes = {
            "norm1": (D,), "norm2": (D,), "mlp.fc1": (40, D), "mlp.fc2": (D, 40), "mixer.in_proj": (3 * D, D), "mixer.out_proj": (D, D),
            "mixer.short_filter": (3 * D, 1, 3), "mixer.filter_fn.implicit_filter.0": (8, 5), "mixer.filter_fn.implicit_filter.2": (8, 8),
            "mixer.filter_fn.implicit_filter.4": (8, 8),
        }  # fmt: skip
        for name, size in sizes.items():
            shapes |= {f"{at}.{name}.weight": size, f"{at}.{name}.bias": size[:1]}
        shapes |= {f"{at}.mixer.filter_fn.bias": (D,), f"{at}.mixer.filter_fn.implicit_filter.6.weight": (D, 8)}
        shapes[f"{at}.mixer.filter_fn.implicit_filter.1.freq"] = (1, 8)
    shapes |= {"hyena.backbone.ln_f.weight": (D,), "hyena.backbone.ln_f.bias": (D,)}
    found = drawn(shapes)
    for i in range(LAYERS):
        found |= {f"hyena.backbone.layers.{i}.mixer.filter_fn.{name}": t for name, t in hyena_features().items()}
    return found


def hyena_logits(w: Tensors, codes: Tensor) -> Tensor:
    """The formula, long convolutions as sums over lags."""
    table = w["hyena.backbone.embeddings.word_embeddings.weight"]
    x, L = table[codes], codes.shape[1]
    for i in range(LAYERS):

        def linear(name: str, u: Tensor, at: str = f"hyena.backbone.layers.{i}") -> Tensor:
            return F.linear(u, w[f"{at}.{name}.weight"], w.get(f"{at}.{name}.bias"))

        def norm(name: str, u: Tensor, at: str = f"hyena.backbone.layers.{i}") -> Tensor:
            return F.layer_norm(u, (D,), w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"])

        m = f"hyena.backbone.layers.{i}.mixer"
        u = linear("mixer.in_proj", norm("norm1", x)).mT
        u = F.conv1d(u, w[f"{m}.short_filter.weight"], w[f"{m}.short_filter.bias"], padding=2, groups=3 * D)[..., :L]
        first, second, v = u.mT.chunk(3, -1)
        h, freq = w[f"{m}.filter_fn.pos_emb.z"][0], w[f"{m}.filter_fn.implicit_filter.1.freq"]
        for n in (0, 2, 4):
            h = torch.sin(freq * linear(f"mixer.filter_fn.implicit_filter.{n}", h))
        h = linear("mixer.filter_fn.implicit_filter.6", h)
        fade = torch.exp(-w[f"{m}.filter_fn.pos_emb.t"][0] * w[f"{m}.filter_fn.modulation.deltas"][0].abs())
        h, v = h * (fade + 0.05), v * second
        long = torch.zeros_like(v)
        for lag in range(L):
            long[:, lag:] += h[lag] * v[:, : L - lag]
        x = x + linear("mixer.out_proj", (long + w[f"{m}.filter_fn.bias"] * v) * first)
        x = x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x)), approximate="tanh"))
    x = F.layer_norm(x, (D,), w["hyena.backbone.ln_f.weight"], w["hyena.backbone.ln_f.bias"])
    return x @ table.T


def caduceus_tensors() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"caduceus.backbone.embeddings.word_embeddings.weight": (16, D)}
    for i in range(LAYERS):
        at = f"caduceus.backbone.layers.{i}"
        shapes[f"{at}.norm.weight"] = (D,)
        for way in ("fwd", "rev"):
            m = f"{at}.mixer.mamba_{way}"
            if way == "fwd":  # the other way has the same projections, which safetensors keeps once
                shapes |= {f"{m}.in_proj.weight": (4 * D, D), f"{m}.out_proj.weight": (D, 2 * D)}
            shapes |= {
                f"{m}.x_proj.weight": (1 + 10, 2 * D), f"{m}.dt_proj.weight": (2 * D, 1), f"{m}.dt_proj.bias": (2 * D,),
                f"{m}.conv1d.weight": (2 * D, 1, 4), f"{m}.conv1d.bias": (2 * D,), f"{m}.A_log": (2 * D, 5), f"{m}.D": (2 * D,),
            }  # fmt: skip
    shapes["caduceus.backbone.norm_f.weight"] = (D,)
    return drawn(shapes)


def mamba_by_definition(w: Tensors, at: str, x: Tensor) -> Tensor:
    L, tied = x.shape[1], at.replace("mamba_rev", "mamba_fwd")
    u, z = F.linear(x, w[f"{tied}.in_proj.weight"]).chunk(2, -1)
    u = F.conv1d(u.mT, w[f"{at}.conv1d.weight"], w[f"{at}.conv1d.bias"], padding=3, groups=2 * D)[..., :L].mT
    u = F.silu(u)
    r, B, C = F.linear(u, w[f"{at}.x_proj.weight"]).split([1, 5, 5], -1)
    dt = F.softplus(F.linear(r, w[f"{at}.dt_proj.weight"], w[f"{at}.dt_proj.bias"]))
    h, found = x.new_zeros(x.shape[0], 2 * D, 5), []
    for t in range(L):
        h = torch.exp(-dt[:, t, :, None] * w[f"{at}.A_log"].exp()) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        found.append((h * C[:, t, None]).sum(-1) + w[f"{at}.D"] * u[:, t])
    return F.linear(torch.stack(found, 1) * F.silu(z), w[f"{tied}.out_proj.weight"])


def caduceus_logits(w: Tensors, codes: Tensor) -> Tensor:
    table = w["caduceus.backbone.embeddings.word_embeddings.weight"]
    x = table[codes]
    for i in range(LAYERS):
        at = f"caduceus.backbone.layers.{i}"
        u = F.rms_norm(x, (D,), w[f"{at}.norm.weight"], 1e-5)
        there = mamba_by_definition(w, f"{at}.mixer.mamba_rev", u.flip(1)).flip(1)
        x = x + mamba_by_definition(w, f"{at}.mixer.mamba_fwd", u) + there
    return F.rms_norm(x, (D,), w["caduceus.backbone.norm_f.weight"], 1e-5) @ table.T


MODELS = {
    "hyenadna": (HYENA, hyena_tensors, hyena_logits),
    "caduceus": (CADUCEUS, caduceus_tensors, caduceus_logits),
}


def published(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [LONGEST, 31])
def test_the_same_model_there_and_back(name: str, length: int, tmp_path: Path) -> None:
    config, make, formula = MODELS[name]
    tensors = make()
    convert(published(tmp_path / "theirs", config, tensors), tmp_path / "ours", kind="plain")
    codes = torch.randint(16, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, _ = load_model(tmp_path / "ours").double().eval()(codes)
    want = formula({key: t.double() for key, t in tensors.items()}, codes)
    # The files hold features of the lag in float32.
    torch.testing.assert_close(
        got, want, rtol=0, atol=(1e-5 if name == "hyenadna" else 1e-11) * float(want.abs().max())
    )
    convert(tmp_path / "ours", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], t) for key, t in tensors.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_features_that_were_trained_are_refused(tmp_path: Path) -> None:
    tensors = hyena_tensors()
    tensors["hyena.backbone.layers.1.mixer.filter_fn.pos_emb.z"][0, 3, 2] += 1e-3
    with pytest.raises(ConvertError, match=r"layers\.1\.mixer\.filter_fn\.pos_emb\.z is not what its formula makes"):
        convert(published(tmp_path / "theirs", HYENA, tensors), tmp_path / "ours")


def test_two_ways_with_projections_of_their_own_do_not_go_back(tmp_path: Path) -> None:
    convert(published(tmp_path / "theirs", CADUCEUS, caduceus_tensors()), tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    tensors["backbone.stages.0.1.mixer.backwards.mixer.in_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ConvertError, match=r"mamba_rev\.in_proj\.weight and .*mamba_fwd\.in_proj\.weight differ"):
        convert(tmp_path / "ours", tmp_path / "back")


def test_an_equivariant_caduceus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="rcps is True, and only False can be converted"):
        convert(published(tmp_path / "theirs", {**CADUCEUS, "rcps": True}, {}), tmp_path / "ours")
