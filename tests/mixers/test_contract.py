"""The contract's own parts: registry and plug-ins, create and list, State helpers, and what Mixer.forward refuses."""

from __future__ import annotations

import importlib.metadata
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mmlong.mixers.contract as contract
from mmlong.layout import Layout
from mmlong.mixers import (
    MIXERS,
    Mixer,
    Traits,
    create_mixer,
    detach_state,
    list_mixers,
    map_state,
    rebuild_state,
    register_mixer,
    require_streaming,
    select_rows,
    state_bytes,
    state_tensors,
    state_to,
)
from mmlong.registry import Registry, nearest


class Sum(Mixer):
    """Adds what went before; enough of a mixer to call."""

    def __init__(self, dim: int, *, causal: bool = True, window: int = 4) -> None:
        super().__init__(dim, causal=causal)
        self.window = window

    def mix(self, x: Tensor, state: Any, layout: Layout | None) -> tuple[Tensor, Any]:
        y = x.cumsum(1) if state is None else state[:, None] + x.cumsum(1)
        return (y, y[:, -1]) if self.streaming else (y, None)


@pytest.fixture
def mixers(monkeypatch: pytest.MonkeyPatch) -> Registry[type[Mixer]]:
    """An empty registry in place of the house's."""
    empty: Registry[type[Mixer]] = Registry("mixer", group="mmlong.mixers")
    monkeypatch.setattr(contract, "MIXERS", empty)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    return empty


def register(name: str, **traits: Any) -> type[Mixer]:
    return register_mixer(name, paper="a paper", **traits)(type(name, (Sum,), {}))


# Registry


def test_a_registered_mixer_is_created_by_name_with_its_options(mixers: Registry[type[Mixer]]) -> None:
    cls = register("sum")
    made = create_mixer("sum", 8, window=3)
    assert type(made) is cls
    assert (made.dim, made.window, made.causal) == (8, 3, True)
    assert cls.traits == Traits(paper="a paper")
    assert "sum" in mixers
    assert "product" not in mixers


def test_an_unknown_name_is_answered_with_the_nearest(mixers: Registry[type[Mixer]]) -> None:
    with pytest.raises(KeyError, match="registered: none"):
        create_mixer("anything", 8)
    register("mamba2")
    register("attention")
    with pytest.raises(
        KeyError, match=r"unknown mixer 'manba2' \(did you mean 'mamba2'\?\); registered: attention, mamba2"
    ):
        create_mixer("manba2", 8)
    with pytest.raises(KeyError, match="unknown mixer 'zzz'; registered"):
        create_mixer("zzz", 8)


def test_an_unknown_option_is_answered_with_the_nearest(mixers: Registry[type[Mixer]]) -> None:
    register("sum")
    with pytest.raises(
        TypeError, match=r"mixer 'sum' has no option 'windw' \(did you mean 'window'\?\); it takes: .*window"
    ):
        create_mixer("sum", 8, windw=3)


def test_a_name_belongs_to_one_class(mixers: Registry[type[Mixer]]) -> None:
    register("sum")
    with pytest.raises(ValueError, match=r"the mixer name 'sum' is taken by .*\.sum"):
        register_mixer("sum", paper="another")(type("Other", (Sum,), {}))


def test_the_same_class_may_register_again(mixers: Registry[type[Mixer]]) -> None:
    """As when its module is reloaded."""
    first = register("sum")
    again = register("sum")
    assert mixers["sum"] is again is not first


def test_a_maker_that_takes_any_option_is_asked_itself() -> None:
    registry: Registry[Any] = Registry("thing")
    registry.register("open")(lambda *args, **options: (args, options))
    assert registry.create("open", 1, anything=2) == ((1,), {"anything": 2})


def test_nearest() -> None:
    assert nearest("casual", ["causal", "window"]) == " (did you mean 'causal'?)"
    assert nearest("qqq", ["causal"]) == ""


# Lists


def test_lists_are_sorted_and_filtered_by_pattern_and_traits(mixers: Registry[type[Mixer]]) -> None:
    register("mamba2")
    register("mamba3", cost="n log n")
    register("attention", state="growing", cost="n^2", bidirectional=True)
    assert list_mixers() == ["attention", "mamba2", "mamba3"]
    assert list_mixers("*mamba*") == ["mamba2", "mamba3"]
    assert list_mixers("mamba?", cost="n log n") == ["mamba3"]
    assert list_mixers(state="growing", bidirectional=True) == ["attention"]
    assert list_mixers(grid=True) == []
    with pytest.raises(TypeError, match=r"no trait 'streming' \(did you mean 'streaming'\?\)"):
        list_mixers(streming=True)


def test_the_house_s_mixers_say_which_paper_they_follow() -> None:
    for name in list_mixers():
        assert MIXERS[name].traits.paper not in ("", "unregistered"), name


# Plug-ins


class Point:
    """An entry point of somebody's package."""

    def __init__(self, name: str, load: Any) -> None:
        self.name, self.value, self._load = name, f"somebody.mixers:{name}", load
        self.loads = 0

    def load(self) -> Any:
        self.loads += 1
        return self._load()


def test_a_plug_in_is_loaded_once_at_the_first_look_up(
    mixers: Registry[type[Mixer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point("theirs", lambda: register("theirs"))
    asked: list[str] = []

    def entry_points(group: str) -> list[Point]:
        asked.append(group)
        return [point]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    register("ours")
    assert not asked, "registering must not load other people's packages"
    assert list_mixers() == ["ours", "theirs"]
    assert type(create_mixer("theirs", 4)).__name__ == "theirs"
    assert asked == ["mmlong.mixers"]
    assert point.loads == 1


def test_a_broken_plug_in_is_named_and_takes_nothing_down(
    mixers: Registry[type[Mixer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ImportError("no module named cuda_only")

    points = [Point("broken", broken), Point("theirs", lambda: register("theirs"))]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match=r"mixer plug-in broken \(somebody.mixers:broken\) does not load: .*cuda_only"):
        assert list_mixers() == ["theirs"]


# A mixer and what it refuses


def test_causal_or_not_is_settled_when_built(mixers: Registry[type[Mixer]]) -> None:
    one_way, both, neither = (
        register("a"),
        register("b", bidirectional=True),
        register("c", causal=False, bidirectional=True),
    )
    assert one_way(4).streaming
    assert not both(4, causal=False).streaming
    assert not register("d", streaming=False)(4).streaming
    with pytest.raises(ValueError, match=r"is causal only: .*direction 'both' or 'alternate'"):
        one_way(4, causal=False)
    with pytest.raises(ValueError, match="has no causal form: build it with causal=False"):
        neither(4)
    with pytest.raises(ValueError, match="needs dim >= 1, got 0"):
        one_way(0)


def test_forward_returns_what_mix_returns(mixers: Registry[type[Mixer]]) -> None:
    mixer, x = register("a")(2), torch.ones(3, 5, 2)
    y, state = mixer(x)
    again, _ = mixer(x, state)
    assert torch.equal(y, x.cumsum(1))
    assert torch.equal(again, y + 5)


@pytest.mark.parametrize("shape", [(5, 2), (1, 5, 3), (1, 0, 2), (1, 1, 5, 2)])
def test_a_wrong_shape_is_refused(mixers: Registry[type[Mixer]], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a takes \(B, L, 2\) with L >= 1, got \(" + ", ".join(map(str, shape))):
        register("a")(2)(torch.zeros(shape))


def test_integers_are_refused(mixers: Registry[type[Mixer]]) -> None:
    with pytest.raises(TypeError, match="a takes floating-point tokens, got torch.int64: embed them first"):
        register("a")(2)(torch.zeros(1, 3, 2, dtype=torch.int64))


def test_a_state_is_refused_where_there_is_none(mixers: Registry[type[Mixer]]) -> None:
    x, state = torch.zeros(1, 3, 2), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="was given a state but has none: it sees both sides"):
        register("a", bidirectional=True)(2, causal=False)(x, state)
    with pytest.raises(ValueError, match="was given a state but has none: its mechanism needs the whole length"):
        register("b", streaming=False)(2)(x, state)


def test_a_layout_that_does_not_fit_or_is_not_honoured_is_refused(mixers: Registry[type[Mixer]]) -> None:
    x = torch.zeros(2, 3, 2)
    lengths, resets = Layout(lengths=torch.tensor([3, 1])), Layout(resets=torch.zeros(2, 3, dtype=torch.bool))
    plain = register("a", padding=False, resets=False)(2)
    with pytest.raises(ValueError, match=r"a does not honour layout.lengths"):
        plain(x, None, lengths)
    with pytest.raises(ValueError, match=r"a does not honour layout.resets"):
        plain(x, None, resets)
    able = register("b")(2)
    able(x, None, lengths)
    able(x, None, resets)
    with pytest.raises(ValueError, match=r"layout.lengths has 2 rows, x has 1"):
        able(x[:1], None, lengths)


def test_a_class_without_mix_or_state_bytes_says_so() -> None:
    class Bare(Mixer):
        pass

    with pytest.raises(TypeError, match=r"Bare does not define mix\(x, state, layout\)"):
        Bare(2)(torch.zeros(1, 1, 2))
    with pytest.raises(TypeError, match=r"Bare does not define state_bytes\(length\)"):
        Bare(2).state_bytes(3)


def test_require_streaming_names_the_power(mixers: Registry[type[Mixer]]) -> None:
    require_streaming(register("a")(2), "generation")
    with pytest.raises(ValueError, match="generation needs a streaming model, but b: it sees both sides"):
        require_streaming(register("b", bidirectional=True)(2, causal=False), "generation")
    with pytest.raises(ValueError, match="prefill needs a streaming model, but Linear"):
        require_streaming(nn.Linear(1, 1), "prefill")


# States


@st.composite
def states(draw: st.DrawFn, rows: int = 3) -> Any:
    """Trees of tensors with ``rows`` first, with None and empty branches."""
    leaf = st.one_of(
        st.none(),
        st.lists(st.integers(1, 3), max_size=2).map(lambda s: torch.randn(rows, *s)),
        st.just(torch.arange(rows)),
    )
    branch = lambda inner: st.one_of(  # noqa: E731
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner),
    )
    return draw(st.recursive(leaf, branch, max_leaves=6))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is None and b is None


@given(states())
@settings(deadline=None)
def test_a_tree_taken_apart_is_put_together_again(state: Any) -> None:
    tensors = state_tensors(state)
    assert same(rebuild_state(state, tensors), state)
    assert same(map_state(lambda t: t.clone(), state), state)
    assert all(isinstance(t, Tensor) for t in tensors)
    assert state_bytes(state) == sum(t.numel() * t.element_size() for t in tensors)


@given(states(), st.lists(st.integers(0, 2), min_size=1, max_size=5))
@settings(deadline=None)
def test_rows_are_selected_by_index_mask_and_slice(state: Any, rows: list[int]) -> None:
    chosen = select_rows(state, torch.tensor(rows))
    for before, after in zip(state_tensors(state), state_tensors(chosen), strict=True):
        assert torch.equal(after, torch.stack([before[r] for r in rows]))
    assert same(select_rows(state, torch.tensor([True, False, True])), select_rows(state, torch.tensor([0, 2])))
    assert same(select_rows(state, slice(1, 2)), select_rows(state, torch.tensor([1])))


def test_detached_and_moved() -> None:
    t = torch.ones(2, 3, requires_grad=True)
    state = {"kv": (t * 2, None), "seen": torch.tensor([1, 2])}
    detached = detach_state(state)
    assert [d.requires_grad for d in state_tensors(detached)] == [False, False]
    assert state_tensors(state)[0].requires_grad
    assert {m.device.type for m in state_tensors(state_to(state, "meta"))} == {"meta"}
    assert state_bytes(state) == 24 + 16
    assert state_tensors(None) == []
    assert map_state(torch.neg, None) is None


class Window(NamedTuple):
    keys: Tensor
    seen: Tensor | None = None


def test_named_tuples_stay_what_they_are() -> None:
    state = (Window(torch.ones(2, 3), torch.tensor([1, 2])), {"w": Window(torch.zeros(2))})
    doubled = map_state(lambda t: 2 * t, state)
    assert type(doubled[0]) is Window
    assert doubled[0].seen.tolist() == [2, 4]
    assert doubled[1]["w"].seen is None
    assert same(rebuild_state(state, state_tensors(state)), state)
    assert select_rows(state, slice(0, 1))[0].keys.shape == (1, 3)


@pytest.mark.parametrize("bad", [3, {"seen": 3}, (torch.ones(1), "text")])
def test_a_state_holds_nothing_but_tensors(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"a state holds tensors, tuples, lists, dicts and None; found (int|str)"):
        map_state(torch.neg, bad)
