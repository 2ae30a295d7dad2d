"""Every named form and every part, as models of bytes: nothing leaks from the future at any level, pieces and documents are the whole, and what is generated is what the whole predicts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmlong.backbone.block import Block
from mmlong.backbone.forms import FORMS
from mmlong.backbone.part import PARTS, Part
from mmlong.backbone.retro import Retro, set_retriever
from mmlong.generation import generate
from mmlong.heads import Sampling
from mmlong.layout import Layout
from mmlong.models import build_model

LOCAL: dict[str, Any] = {"name": "local", "window": 9}

FORM_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "megabyte": [{"patch": 5, "global_dim": 24, "global_layers": 1, "local_layers": 1}],
    "hourglass": [{"layers": [1, 1]}, {"pool": [2, 3], "layers": [1, 1, 1], "mixer": LOCAL}],
    "hnet": [{"layers": 1, "d_state": 8}, {"stages": 2, "layers": 1, "d_state": 8, "window": 9}],
    "spacebyte": [{"global_layers": 1, "local_layers": 2, "window": 9}],
    "sashimi": [{"pool": [3, 2], "layers": 1, "mixer": "s4d"}, {"pool": [4], "layers": 1, "unet": True}],
    "block_recurrent": [{"layers": 3, "window": 12, "states": 4}],
    "rmt": [{"layers": 1, "tokens": 2, "segment": 17}],
    "universal_transformer": [{"steps": 3}],
}

PART_LISTS: dict[str, list[Any]] = {
    "pool": [{"pool": 4, "parts": ["gru"]}],
    "pool, mean": [{"pool": 3, "down": "mean", "up": "repeat", "parts": [LOCAL]}],
    "pool, lag": [{"pool": 4, "lag": 1, "dim": 24, "parts": ["attention"]}],
    "pool, nested": [LOCAL, {"pool": 2, "parts": ["gru", {"pool": 3, "down": "attention", "up": "attention", "reach": 2, "parts": ["attention"]}]}],
    "within": ["gru", {"within": 6, "parts": ["attention"]}],
    "dynamic": [LOCAL, {"dynamic": 3, "dim": 24, "parts": ["attention", {"dynamic": 2, "parts": ["gru"]}]}],
    "recurrent_memory": [{"recurrent_memory": 2, "segment": 23, "parts": [LOCAL, {"pool": 2, "parts": ["gru"]}]}],
    "universal": [{"universal": 3, "parts": [LOCAL]}],
    "perceiver_ar": [{"perceiver_ar": 5, "heads": 2, "parts": [LOCAL]}, "gru"],
    "mixture_of_depths": [LOCAL, {"mixture_of_depths": 0.4, "parts": ["attention"]}],
    "ttm": [LOCAL, {"ttm": 4, "size": 6, "read": 3, "parts": ["attention"]}, "gru"],
    "feedback": ["gru", {"feedback": 2, "window": 7, "heads": 2}],
    "retro": [LOCAL, {"retro": 4, "layers": 1, "heads": 2}, "gru"],
    "ngrams": [{"ngrams": [1, 3, 4], "rows": 50, "width": 6}, "gru"],
    "spacebyte": [LOCAL, {"spacebyte": "utf8", "parts": ["attention", {"pool": 2, "parts": ["gru"]}]}, "gru"],
}  # fmt: skip

SEE_BOTH_SIDES: dict[str, dict[str, Any]] = {
    **{
        key: {key: 2, "parts": ["gru"]}
        for key in ("perceiver", "perceiver_io", "token_learner", "charformer", "funnel")
    },
    "timm": {"timm": "test_resnet", "stage": 1},
    "transformers": {"transformers": "fnet", "layers": 1},
}
"""Parts that no causal backbone may have."""

MEMORIES: dict[str, dict[str, Any]] = {
    "transformer_xl": {"segment": 32, "memory": 32},
    "compressive": {"segment": 16, "memory": 16, "compressed": 16, "rate": 4},
    "infini_attention": {"segment": 32},
    "memorizing": {"segment": 32, "near": 32, "topk": 4},
    "block_recurrent": {"window": 16, "states": 4},
}

TOWERS: dict[str, dict[str, Any]] = {
    **{
        f"form {name} {n}": {"form": {"name": name, **options}}
        for name, sizes in FORM_OPTIONS.items()
        for n, options in enumerate(sizes)
    },
    **{name: {"parts": parts} for name, parts in PART_LISTS.items()},
}


def model(backbone: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made: Any = build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "backbone": {"dim": 16, "ffn_ratio": 1.0, **backbone}}
    )
    if any(isinstance(part, Retro) for part in made.modules()):
        # What is found for a chunk is the chunk itself, twice over.
        set_retriever(made, lambda chunks, training: chunks.repeat(1, 4).view(-1, 2, 2 * chunks.shape[1]))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
        # Letters and what stands between words, so that words come.
        made.head.linear.bias[list(b"aeinst ,.")] += 4
        # And what is predicted hangs on the features, or greedy choices soon are one letter for ever.
        made.head.linear.weight.mul_(4)
    return made.double().eval()


def drawn(rows: int, length: int, seed: int = 0) -> Tensor:
    """Bytes as of words."""
    known = torch.tensor(list("aeinst  ,é".encode()))
    return known[torch.randint(len(known), (rows, length), generator=torch.Generator().manual_seed(seed))]


def test_every_form_and_part_has_a_tower() -> None:
    assert set(FORM_OPTIONS) == set(FORMS.names()), "write a small tower for each form into FORM_OPTIONS"
    keys = {name.partition(",")[0] for name in PART_LISTS}
    assert keys | set(SEE_BOTH_SIDES) == set(PARTS.names()), "write a small tower for each causal part into PART_LISTS"


@pytest.mark.parametrize("key", SEE_BOTH_SIDES)
def test_what_sees_both_sides_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="direction"):
        model({"parts": ["gru", SEE_BOTH_SIDES[key]]})


@pytest.mark.parametrize("name", TOWERS)
def test_nothing_leaks(name: str) -> None:
    """Each byte, and at every level each vector, is changed by itself; nothing before it may notice, and something from it on does."""
    length, m = 37, model(TOWERS[name])
    calls: dict[nn.Module, tuple[Tensor, Layout | None]] = {}

    def kept(module: nn.Module, args: tuple[Any, ...]) -> None:
        x, state, layout = args
        if state is None and (module not in calls or calls[module][0].shape[1] < x.shape[1]):
            calls[module] = (x, layout)

    levels = {path: part for path, part in m.backbone.named_modules() if isinstance(part, Part | Block)}
    hooks = [part.register_forward_pre_hook(kept) for part in levels.values()]
    tokens = drawn(1, length)
    with torch.no_grad():
        m(tokens)
        for hook in hooks:
            hook.remove()
        rows = tokens.repeat(length + 1, 1)
        here = torch.arange(length)
        rows[here, here] = torch.where(rows[here, here] == 32, 97, 32)
        y, _ = m(rows)
        changed = (y[:-1] - y[-1:]).abs().amax(-1) > 1e-9
        # What is predicted of a byte depends on those before it.
        assert not (changed & (here <= here[:, None])).any()
        assert changed.any(1)[:-1].all()
        assert set(calls) == set(levels.values())
        for path, part in levels.items():
            if not part.causal:  # as inside ttm, which keeps the future out itself
                assert any(
                    getattr(m.backbone.get_submodule(path[:n]), "inside", None) == "both"
                    for n in range(len(path))
                    if path[n] == "."
                )
                continue
            x, layout = calls[part]
            L = x.shape[1]
            here = torch.arange(L)
            xs = x[:1].repeat(L + 1, 1, 1)
            xs[here, here] += torch.randn(L, x.shape[2], dtype=x.dtype)
            if layout is not None:
                told = {
                    key: t[:1].expand(L + 1, -1)
                    for key in ("resets", "codes")
                    if (t := getattr(layout, key)) is not None
                }
                lengths = None if layout.lengths is None else layout.lengths[:1].expand(L + 1)
                layout = dataclasses.replace(layout, lengths=lengths, **told)
            y, _ = part(xs, None, layout)
            changed = (y[:-1] - y[-1:]).abs().amax(-1) > 1e-9
            assert not (changed & (here < here[:, None])).any(), path
            assert changed.any(1).all(), path


@pytest.mark.parametrize("name", TOWERS)
def test_pieces_and_documents_are_the_whole(name: str) -> None:
    length, m = 37, model(TOWERS[name])
    tokens = drawn(2, length)
    resets = torch.zeros(2, length, dtype=torch.bool)
    resets[0, [5, 6, 23]], resets[1, 18] = True, True
    layout = Layout(lengths=torch.tensor([length, 31]), resets=resets)
    with torch.no_grad():
        packed, _ = m(tokens, None, layout)
        for row, a, b in ((0, 6, 23), (0, 23, 37), (1, 18, 31)):
            torch.testing.assert_close(packed[row : row + 1, a:b], m(tokens[row : row + 1, a:b])[0])
        for given, want, size in ((None, m(tokens)[0], 7), (layout, packed, 1)):
            valid = layout.valid(length) if given is layout else torch.ones(2, length, dtype=torch.bool)
            state, parts = None, []
            for a in range(0, length, size):
                b = min(a + size, length)
                y, state = m(tokens[:, a:b], state, None if given is None else given.slice(a, b))
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1)[valid], want[valid])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOWERS, *MEMORIES])
def test_generates_what_the_whole_predicts(name: str) -> None:
    """A thousand tokens, greedily, one at a time; and each is the likeliest of the whole forward over all of them."""
    memory = MEMORIES.get(name)
    backbone = TOWERS[name] if memory is None else {"parts": [{"name": name, **memory}, {"name": name, **memory}]}
    # Random weights soon choose one letter for ever; of a few, some do not.
    for seed in range(6):
        m = model(backbone, seed)
        tokens = generate(m, 1000, drawn(2, 13), sampling=Sampling(temperature=0)).clone()
        with torch.no_grad():
            prediction, _ = m(tokens)
        assert tokens.shape == (2, 1013)
        assert (prediction.argmax(-1) == tokens)[:, 13:].all()
        if all(len(row[13:].unique()) > 1 for row in tokens):
            return
    raise AssertionError("all that was generated is one letter")
