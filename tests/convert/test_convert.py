"""Every converter on a small random model: whole-model outputs are the same, and there and back is the same to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlong.convert import CONVERTERS, convert
from mmlong.mixers.bigbird import random_blocks as listed
from mmlong.models import AutoregressiveModel, load_model

T = pytest.importorskip("transformers")

Make = Callable[[], nn.Module]


def gpt2(**more: Any) -> nn.Module:
    config = T.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=49, eos_token_id=49, **more
    )
    return T.GPT2LMHeadModel(config)


def imagegpt() -> nn.Module:
    return T.ImageGPTForCausalImageModeling(
        T.ImageGPTConfig(vocab_size=17, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    )


def mamba() -> nn.Module:
    return T.MambaForCausalLM(T.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=5))


def mamba2() -> nn.Module:
    config = T.Mamba2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=2, state_size=8, chunk_size=16,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T.Mamba2ForCausalLM(config)


def rwkv() -> nn.Module:
    return T.RwkvForCausalLM(T.RwkvConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=96))


def recurrent_gemma(**more: Any) -> nn.Module:
    config = T.RecurrentGemmaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1, intermediate_size=120,
        attention_window_size=8, lru_width=48, **more,
    )  # fmt: skip
    return T.RecurrentGemmaForCausalLM(config)


def xlstm(**more: Any) -> nn.Module:
    config = T.xLSTMConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_heads=4, autocast_kernel_dtype="float32", chunk_size=8, **more
    )  # fmt: skip
    return T.xLSTMForCausalLM(config)


def longformer() -> nn.Module:
    config = T.LongformerConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, attention_window=[8, 12],
        max_position_embeddings=70, type_vocab_size=2, sep_token_id=2,
    )  # fmt: skip
    return T.LongformerForMaskedLM(config)


def big_bird(**more: Any) -> nn.Module:
    config = T.BigBirdConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, max_position_embeddings=130,
        sep_token_id=3, block_size=4, num_random_blocks=1, **more,
    )  # fmt: skip
    return T.BigBirdForMaskedLM(config)


def perceiver(**more: Any) -> nn.Module:
    config = T.PerceiverConfig(
        vocab_size=50, num_latents=6, d_latents=40, d_model=32, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=2, max_position_embeddings=64, self_attention_widening_factor=2, **more,
    )  # fmt: skip
    return T.PerceiverForMaskedLM(config)


MODELS: dict[str, tuple[Make, torch.dtype, float]] = {
    "gpt2": (gpt2, torch.float64, 1e-12),
    "gpt2, untied, of another width": (lambda: gpt2(tie_word_embeddings=False, n_inner=72), torch.float64, 1e-12),
    "imagegpt": (imagegpt, torch.float64, 1e-12),
    "mamba": (mamba, torch.float32, 1e-5),
    "mamba2": (mamba2, torch.float32, 1e-5),
    "rwkv": (rwkv, torch.float32, 1e-5),
    "recurrent_gemma": (recurrent_gemma, torch.float32, 1e-5),
    "recurrent_gemma, with biases": (lambda: recurrent_gemma(attention_bias=True), torch.float32, 1e-5),
    "xlstm": (xlstm, torch.float32, 1e-5),
    "longformer": (longformer, torch.float32, 1e-5),
    "big_bird, dense": (
        lambda: big_bird(attention_type="original_full", rescale_embeddings=True),
        torch.float64,
        1e-12,
    ),
    "big_bird": (big_bird, torch.float64, 1e-12),
    "perceiver": (lambda: perceiver(qk_channels=16, v_channels=40), torch.float64, 1e-12),
    "perceiver, of the latents' width": (
        lambda: perceiver(cross_attention_shape_for_attention="q"),
        torch.float64,
        1e-12,
    ),
}
"""A model of theirs, in which precision it is compared, and how near (theirs compute some of it in float32 whatever they are given)."""


def moved(make: Make, seed: int = 0) -> nn.Module:
    """A model with every parameter moved off what it starts from, so that none could be exchanged for another unseen."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def codes(model: Any, length: int = 41) -> Tensor:
    """Some codes: none that stands for padding, from which Longformer counts its places, and whole blocks for BigBird."""
    length = length if model.config.model_type != "big_bird" else 44
    return torch.randint(2, model.config.vocab_size - 1, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        masked = model.config.model_type in ("longformer", "big_bird", "perceiver")
        found: Tensor = model(tokens, **({} if masked else {"use_cache": False})).logits
    # A Perceiver answers for all of its places.
    return found[:, : tokens.shape[1]]


def ours_on(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_model(folder).to(dtype).eval()(tokens)[0]
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_every_converter_is_tested() -> None:
    elsewhere = {"hyenadna", "caduceus"}  # test_published_names
    assert set(CONVERTERS.names()) == {name.partition(",")[0] for name in MODELS} | elsewhere


@pytest.fixture(autouse=True)
def random_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' BigBird draws no random blocks at inference; here it is given those of the mixer."""
    code = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")

    def drawn(self: Any, num_heads: int, from_seq_length: int, from_block_size: int, **_: Any) -> list[Any]:
        return list(listed(num_heads, from_seq_length // from_block_size, 3, 1, self.seed))

    monkeypatch.setattr(code.BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", drawn)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_there_and_back(name: str, tmp_path: Path) -> None:
    make, dtype, near = MODELS[name]
    theirs: Any = moved(make)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", kind="plain")
    tokens = codes(theirs)
    want = logits(theirs.to(dtype), tokens)
    got = ours_on(tmp_path / "ours", tokens, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=near * float(want.abs().max().clamp_min(1)))

    convert(tmp_path / "ours", tmp_path / "back")
    assert same(
        load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    )
    again, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(again.eval().to(dtype), tokens), want)


@pytest.mark.parametrize(
    "name", [name for name in CONVERTERS.names() if name in MODELS and "autoregressive" in CONVERTERS[name].kinds]
)
def test_an_autoregressive_model_predicts_what_theirs_does_behind_its_first_code(name: str, tmp_path: Path) -> None:
    make, dtype, near = MODELS[name]
    theirs: Any = moved(make)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    tokens = codes(theirs)
    model = load_model(tmp_path / "ours").to(dtype).eval()
    assert isinstance(model, AutoregressiveModel)
    first = torch.full((2, 1), int(model.config["start"]))
    want = logits(theirs.to(dtype), torch.cat([first, tokens[:, :-1]], 1))
    limit = near * float(want.abs().max().clamp_min(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], want, rtol=0, atol=limit)
        state, found = model.begin(2), []
        for t in range(9):
            prediction, state = model.peek(state)
            state = model.put(state, tokens[:, t : t + 1])
            found.append(prediction)
    torch.testing.assert_close(torch.cat(found, 1), want[:, :9], rtol=0, atol=max(limit, 1e-11))
    convert(tmp_path / "ours", tmp_path / "back")
    assert same(
        load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "theirs" / "config.json").read_text()
    )


@pytest.mark.parametrize("tokens_that_see_all", [1, 3])
def test_longformer_with_global_tokens(tokens_that_see_all: int, tmp_path: Path) -> None:
    theirs: Any = moved(longformer)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", globals=tokens_that_see_all)
    tokens = codes(theirs)
    seen = (torch.arange(tokens.shape[1]) < tokens_that_see_all).long().expand_as(tokens)
    with torch.no_grad():
        want = theirs(tokens, global_attention_mask=seen).logits
    near = 1e-5 * float(want.abs().max())
    torch.testing.assert_close(ours_on(tmp_path / "ours", tokens, torch.float32), want, rtol=0, atol=near)
    assert not torch.allclose(logits(theirs, tokens), want, rtol=0, atol=10 * near)
    convert(tmp_path / "ours", tmp_path / "back")
    assert same(
        load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    )


def test_xlstm_of_fused_projections_is_that_of_single_ones(tmp_path: Path) -> None:
    """transformers cannot make one anew (its initial values do not fit), so the tensors are put together here as its layer takes them apart."""
    moved(xlstm).save_pretrained(tmp_path / "single")
    single = load_file(tmp_path / "single" / "model.safetensors")
    fused, parts = dict(single), {"qkv_opreact.weight": ("q.weight", "k.weight", "v.weight", "ogate_preact.weight")}
    parts |= {f"ifgate_preact.{kind}": (f"igate_preact.{kind}", f"fgate_preact.{kind}") for kind in ("weight", "bias")}
    for i in range(2):
        at = f"backbone.blocks.{i}"
        for whole, names in parts.items():
            fused[f"{at}.mlstm_layer.{whole}"] = torch.cat([fused.pop(f"{at}.mlstm_layer.{name}") for name in names])
        gates = [fused.pop(f"{at}.ffn.{name}.weight") for name in ("proj_up_gate", "proj_up")]
        fused[f"{at}.ffn.proj_up_gate_z.weight"] = torch.cat(gates)
    (tmp_path / "fused").mkdir()
    config = json.loads((tmp_path / "single" / "config.json").read_text())
    (tmp_path / "fused" / "config.json").write_text(json.dumps({**config, "weight_mode": "fused"}))
    save_file(fused, tmp_path / "fused" / "model.safetensors")
    for name in ("single", "fused"):
        convert(tmp_path / name, tmp_path / f"ours-{name}")
        convert(tmp_path / f"ours-{name}", tmp_path / f"back-{name}")
    ours = (load_file(tmp_path / f"ours-{name}" / "model.safetensors") for name in ("single", "fused"))
    assert same(*ours)
    assert same(load_file(tmp_path / "back-fused" / "model.safetensors"), fused)
