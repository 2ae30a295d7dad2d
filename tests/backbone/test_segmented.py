"""Training in segments gives the gradient of the whole, for every streaming mixer in the registry."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from mmlong.backbone import Backbone, BackboneConfig, segmented_loss
from mmlong.heads import CategoricalHead
from mmlong.layout import Layout
from mmlong.mixers import list_mixers, map_state, state_tensors
from mmlong.testing.kinds import MORE_KINDS


class ByteModel(nn.Module):
    """Embedding, two blocks, logits: small, but every part that a segment holds."""

    def __init__(self, mixer: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.backbone = Backbone(BackboneConfig(dim=16, depth=2, mixers=[mixer], dropout=dropout, drop_path=dropout))
        self.head = CategoricalHead(16, 11)
        self.widest = 0

    causal = True

    @property
    def streaming(self) -> bool:
        return self.backbone.streaming

    def step(self, pieces, state, layout):
        codes, targets = pieces
        x, state = self.backbone(self.embed(codes), state, layout)
        logits = self.head(x)
        self.widest = max(self.widest, logits.shape[1])
        return self.head.loss(logits, targets, layout)[0], state


def layouts(length: int) -> dict[str, Layout | None]:
    resets = torch.zeros(3, length, dtype=torch.bool)
    resets[0, 5], resets[1, 31], resets[1, 32], resets[2, 0] = True, True, True, True
    lengths = torch.tensor([length, 40, 7])
    return {"full": None, "padded": Layout(lengths=lengths), "packed": Layout(lengths=lengths, resets=resets)}


def gradients(model: ByteModel, codes, targets, segment: int, layout) -> tuple[float, dict[str, torch.Tensor], int]:
    model.zero_grad()
    model.widest = 0
    torch.manual_seed(1)
    loss, _ = segmented_loss(model, model.step, [codes, targets], segment, layout=layout)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, model.widest


@pytest.mark.parametrize("kind", ["full", "padded", "packed"])
@pytest.mark.parametrize("mixer", MORE_KINDS)
def test_four_segments_give_the_whole_gradient(mixer: str, kind: str) -> None:
    torch.manual_seed(0)
    length, segment = 65, 19
    model = ByteModel(mixer).double()
    codes, targets = torch.randint(11, (2, 3, length))
    layout = layouts(length)[kind]
    whole, expected, _ = gradients(model, codes, targets, length, layout)
    loss, found, widest = gradients(model, codes, targets, segment, layout)
    assert widest == segment, "logits of more than a segment existed"
    assert loss == pytest.approx(whole, rel=1e-10)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-7, atol=1e-9 * float(value.abs().max() + 1), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("mixer", list_mixers("mamba2"))
def test_dropout_is_replayed(mixer: str) -> None:
    """With dropout, segments draw other masks than the whole would, so the reference is the same pieces with one graph kept."""
    torch.manual_seed(0)
    model = ByteModel(mixer, dropout=0.3).double()
    codes, targets = torch.randint(11, (2, 2, 50))
    _, found, _ = gradients(model, codes, targets, 20, None)
    model.zero_grad()
    torch.manual_seed(1)
    total, state = 0, None
    for i in range(0, 50, 20):
        loss, state = model.step([codes[:, i : i + 20], targets[:, i : i + 20]], state, None)
        total = total + loss
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mixer", list_mixers("mamba2"))
def test_state_and_real_inputs_get_gradients(mixer: str) -> None:
    """Two calls in a row, the state carried with its graph, equal one call; and real-valued inputs get their gradient."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(dim=16, depth=2, mixers=[mixer])).double()
    x = torch.randn(2, 60, 16, dtype=torch.float64, requires_grad=True)

    def step(pieces, state, layout):
        y, state = backbone(pieces[0], state, layout)
        return y.square().sum() * 0.1 + y.sin().sum(), state

    whole, _ = segmented_loss(backbone, step, [x], 60)
    expected = torch.autograd.grad(whole, [x, *backbone.parameters()])
    first, state = segmented_loss(backbone, step, [x[:, :33]], 10)
    second, _ = segmented_loss(backbone, step, [x[:, 33:]], 10, state=state)
    found = torch.autograd.grad(first + second, [x, *backbone.parameters()])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_refuses_a_model_that_sees_both_sides() -> None:
    from mmlong.mixers import create_mixer

    mixer = create_mixer(list_mixers(bidirectional=True)[0], 16, causal=False)
    with pytest.raises(ValueError, match="training in segments needs a streaming model.*both sides"):
        segmented_loss(mixer, lambda p, s, la: (p[0].sum(), s), [torch.zeros(1, 8, 16)], 4)


@pytest.mark.parametrize("keep", [2, 3, 7, 100, "sqrt"])
def test_states_computed_again_change_no_gradient(keep) -> None:
    """With dropout: the replay of what was not kept draws the same numbers. To the bit, since the same is computed in the same order."""
    torch.manual_seed(0)
    model = ByteModel("mamba2", dropout=0.3).double()
    codes, targets = torch.randint(11, (2, 3, 65))
    layout = layouts(65)["packed"]

    def run(keep):
        model.zero_grad()
        torch.manual_seed(1)
        loss, _ = segmented_loss(model, model.step, [codes, targets], 9, layout=layout, keep=keep)
        loss.backward()
        after = torch.rand(())
        return loss, after, [p.grad.clone() for p in model.parameters()]

    (loss, after, expected), (again, after_too, found) = run(1), run(keep)
    assert torch.equal(loss, again)
    assert torch.equal(after, after_too)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("keep", "after_forward", "most"), [(1, 15, 16), (4, 3, 7), ("sqrt", 3, 7), (16, 0, 16)])
def test_so_many_states_are_alive(keep, after_forward: int, most: int) -> None:
    """Counted by what the step made: 16 segments, of whose 15 incoming states only every k-th is kept."""
    weight = nn.Parameter(torch.ones(3))
    made: list[weakref.ref] = []
    counts: list[int] = []

    class Sum(nn.Module):
        streaming = True

        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

    def alive() -> int:
        return sum(ref() is not None for ref in made)

    def step(pieces, state, layout):
        state = state * 1.5 + (pieces[0].sum(1) * weight)
        made.append(weakref.ref(state))
        counts.append(alive())
        return state.square().sum(), state

    x = torch.randn(2, 32, 3)
    loss, final = segmented_loss(Sum(), step, [x], 2, state=torch.zeros(2, 3), keep=keep)
    del final
    assert alive() == after_forward  # the first of the kept is the caller's, which the step has not made
    counts.clear()
    loss.backward()
    assert max(counts) == most


def test_truncated_is_the_gradient_with_the_state_cut() -> None:
    torch.manual_seed(0)
    model = ByteModel("mamba2").double()
    codes, targets = torch.randint(11, (2, 2, 50))
    _, past = model.step([codes[:, :9], targets[:, :9]], None, None)
    total, state = 0, past
    for i in range(0, 50, 20):
        state = map_state(torch.Tensor.detach, state)
        loss, state = model.step([codes[:, i : i + 20], targets[:, i : i + 20]], state, None)
        total = total + loss
    pieces = (total + sum(t.sum() for t in state_tensors(state))) * 2
    expected = torch.autograd.grad(pieces, list(model.parameters()), allow_unused=True)
    found_loss, found_state = segmented_loss(model, model.step, [codes, targets], 20, state=past, truncate=True, keep=2)
    whole = (found_loss + sum(t.sum() for t in state_tensors(found_state))) * 2
    torch.testing.assert_close(whole, pieces)
    found = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_gradient_is_asked_for_once() -> None:
    model = ByteModel("mamba2")
    codes, targets = torch.randint(11, (2, 1, 8))
    loss, _ = segmented_loss(model, model.step, [codes, targets], 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("keep", [0, -1, True, "half"])
def test_a_senseless_keep_is_refused(keep) -> None:
    model = ByteModel("mamba2")
    with pytest.raises(ValueError, match="keep is .*'sqrt'"):
        segmented_loss(model, model.step, [torch.zeros(1, 8, dtype=torch.int64)] * 2, 4, keep=keep)
