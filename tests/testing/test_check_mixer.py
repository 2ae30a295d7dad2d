"""check_mixer accepts sound mixers of other kinds than the house's, and its own arguments and messages are in order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mmlong.mixers import Mixer, Traits, list_mixers
from mmlong.testing import PROPERTY_NAMES, ConformanceError, check_mixer
from mmlong.testing.example import DecayingSum


@pytest.mark.slow
def test_the_sound_twin_passes_everything() -> None:
    assert set(check_mixer(DecayingSum)) == set(PROPERTY_NAMES) - {"both sides"}


@pytest.mark.slow
def test_the_sound_two_sided_twin_passes_everything() -> None:
    ran = check_mixer(DecayingSum, options={"causal": False})
    assert set(ran) == set(PROPERTY_NAMES) - {"causality", "pieces", "segments"}


class Pointwise(Mixer):
    """Causal without a past: its state is None and yet it streams."""

    traits = Traits(paper="none", state="none")

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.map = nn.Linear(dim, dim)

    def state_bytes(self, length):
        return 0

    def mix(self, x, state, layout):
        return self.map(x), None


class MeanOfAll(Mixer):
    """Two-sided only, and honours no part of a layout."""

    traits = Traits(
        paper="none", causal=False, bidirectional=True, streaming=False, state="none", padding=False, resets=False
    )

    def __init__(self, dim: int) -> None:
        super().__init__(dim, causal=False)
        self.map = nn.Linear(dim, dim)

    def state_bytes(self, length):
        return 0

    def mix(self, x, state, layout):
        return self.map(x) + x.mean(1, keepdim=True), None


class RunningMax(Mixer):
    """Not smooth: a running maximum, and a growing state, the inputs themselves."""

    traits = Traits(paper="none", state="growing", padding=False, resets=False)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.map = nn.Linear(dim, dim)

    def state_bytes(self, length):
        return 4 * self.dim * length

    def mix(self, x, state, layout):
        past = x.new_zeros(x.shape[0], 0, self.dim) if state is None else state
        every = torch.cat([past, x], 1)
        top = every.cummax(1).values[:, past.shape[1] :]
        return self.map(top + x.relu()), every


class ByFourier(Mixer):
    """A gated long convolution by FFT, whose rounding reaches everywhere, the future included."""

    traits = Traits(paper="none", state="growing", cost="n log n", padding=False, resets=False)

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.map = nn.Linear(dim, 2 * dim)
        self.rate = nn.Parameter(torch.linspace(-4.0, -1.0, dim))

    def state_bytes(self, length):
        return 4 * self.dim * length

    def mix(self, x, state, layout):
        gate, v = self.map(x).chunk(2, -1)
        v = v if v.dtype == torch.float64 else v.float()
        past = 0 if state is None else state.shape[1]
        every = v if state is None else torch.cat([state, v], 1)
        length = every.shape[1]
        kernel = torch.exp(-self.rate.exp() * torch.arange(length, dtype=v.dtype)[:, None])
        spectrum = torch.fft.rfft(every, 2 * length, 1) * torch.fft.rfft(kernel, 2 * length, 0)
        y = torch.fft.irfft(spectrum, 2 * length, 1)[:, past:length]
        return gate * y.to(gate.dtype), every.clone()


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Pointwise, MeanOfAll, RunningMax, ByFourier])
def test_other_sound_mixers_pass(cls: type[Mixer]) -> None:
    ran = check_mixer(cls)
    assert ("padding" in ran) == cls.traits.padding
    assert ("pieces" in ran) == cls.traits.streaming


class OneSided(DecayingSum):
    """Built to see both sides, it sees only the past."""

    def mix(self, x, state, layout):
        y, state = self.forwards(x, state, layout)
        return y, state if self.causal else None


class TwoSidedAcrossResets(DecayingSum):
    def conv_starts(self, layout):
        return None


class TwoSidedAcrossPadding(DecayingSum):
    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        return y if self.causal else y + 0.01 * x.mean(1, keepdim=True), state


@pytest.mark.parametrize(
    ("fault", "prop"), [(OneSided, "both sides"), (TwoSidedAcrossResets, "resets"), (TwoSidedAcrossPadding, "padding")]
)
def test_faults_of_the_two_sided_form_are_refused(fault: type[DecayingSum], prop: str) -> None:
    with pytest.raises(ConformanceError) as caught:
        check_mixer(fault, options={"causal": False})
    assert caught.value.property == prop
    assert f"{fault.__name__}(causal=False) (dim 16)" in str(caught.value)


class ReadsPositions(DecayingSum):
    """Adds the coordinates that it is told; ``faulty`` ones restart in every piece, are scaled when they come from a grid, or have no gradient there."""

    traits = dataclasses.replace(DecayingSum.traits, grid=True)
    faulty = ""

    def mix(self, x, state, layout):
        y, state = super().mix(x, state, layout)
        if layout is None or (layout.grid is None and layout.positions is None):
            return y, state
        told = layout.coordinates(x.shape[1], x.device).to(x.dtype).sum(-1, keepdim=True)
        if self.faulty == "restarts":
            told = told - told[:, :1]
        if self.faulty == "scaled" and layout.grid is not None:
            told = told / layout.grid[-1]
        if self.faulty == "detached" and layout.grid is not None:
            y = y.detach()
        return y + 0.1 * told, state


def test_grids() -> None:
    assert check_mixer(ReadsPositions, only="grid") == ("grid",)
    for faulty in ("restarts", "scaled"):
        with pytest.raises(ConformanceError, match="grid: "):
            check_mixer(type("Faulty", (ReadsPositions,), {"faulty": faulty}), only="grid")
    with pytest.raises(ConformanceError, match=r"grid: with a grid, which its traits say it does not read"):
        check_mixer(type("Undeclared", (ReadsPositions,), {"traits": DecayingSum.traits}), only="grid")
    with pytest.raises(ConformanceError, match=r"grid: its traits say that it reads the grid, but"):
        check_mixer(type("Blind", (DecayingSum,), {"traits": ReadsPositions.traits}), only="grid")
    with pytest.raises(ConformanceError, match=r"gradients: on a grid: "):
        check_mixer(type("Faulty", (ReadsPositions,), {"faulty": "detached"}), only="gradients")


def test_the_message_says_where_and_by_how_much() -> None:
    class Off(DecayingSum):
        def mix(self, x, state, layout):
            y, after = super().mix(x, state, layout)
            if state is not None and x.shape[1] == 100:
                y = y + 0.25 * (torch.arange(100) == 7)[:, None] * (torch.arange(self.dim) == 3)
            return y, after

    with pytest.raises(ConformanceError) as caught:
        check_mixer(Off)
    text = str(caught.value)
    assert "Off (dim 16) breaks the contract: pieces: outputs in pieces of [1, 64, 100, 92] against the whole" in text
    assert "(B = 1, L = 257, float64): first wrong at row 0, position 72, channel 3: " in text
    assert "worst difference 0.25 at row 0, position 72, channel 3; 1 of 4112 values" in text


def test_a_crash_is_a_failure_with_its_cause() -> None:
    class Crashes(DecayingSum):
        def mix(self, x, state, layout):
            if x.shape[1] == 62:
                raise IndexError("chunk out of range")
            return super().mix(x, state, layout)

    with pytest.raises(ConformanceError, match=r"pieces: .*\[1:63\].*raised IndexError: chunk out of range") as caught:
        check_mixer(Crashes)
    assert isinstance(caught.value.__cause__, IndexError)


def test_names_options_and_arguments() -> None:
    with pytest.raises(KeyError, match="unknown mixer"):
        check_mixer("no such mixer at all")
    with pytest.raises(ValueError, match=r"unknown property 'reset' \(did you mean 'resets'\?\)"):
        check_mixer(DecayingSum, only="reset")
    with pytest.raises(ValueError, match="at least one width"):
        check_mixer(DecayingSum, dims=())
    with pytest.raises(ValueError, match="no traits"):
        check_mixer(nn.Identity)
    with pytest.raises(TypeError):
        check_mixer(DecayingSum, options={"window": 3})
    name = list_mixers()[0]
    assert check_mixer(name, only=["manners"], dims=(16,)) == ("manners",)
    with pytest.raises(TypeError, match="has no option 'dimm'"):
        check_mixer(name, options={"dimm": 3})


def test_given_traits_are_what_is_checked() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_mixer(DecayingSum, traits=dataclasses.replace(DecayingSum.traits, state="growing"), only="state")
    assert "state = 'growing', but declares" in str(caught.value)


def test_the_caller_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        check_mixer(DecayingSum, only=["manners", "gradients"], dims=(8,))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
