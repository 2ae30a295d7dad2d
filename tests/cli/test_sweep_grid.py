"""The grid of a sweep: values with commas inside them, and every combination once."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmlong.cli.errors import CommandError
from mmlong.cli.sweep_grid import Axis, combinations, parse_axes, short_names, split_values

plain = st.one_of(st.integers(-999, 999), st.text("abcxyz_", min_size=1, max_size=5).filter(lambda s: s not in ("y",)))
nested = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("klm", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.lists(nested, min_size=1, max_size=5))
def test_values_come_back_whatever_brackets_they_have(values: list[object]) -> None:
    texts = [yaml.safe_dump(value, default_flow_style=True, width=10**6).partition("\n")[0] for value in values]
    found = split_values(",".join(texts))
    assert [yaml.safe_load(text) for text in found] == values


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "[1,2", "1]", "{a: [1}", "'a,b"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(CommandError, match="--grid"):
        split_values(text)


def test_quotes_hold_commas_and_brackets() -> None:
    assert split_values("'a,b',\"[\", c") == ["'a,b'", '"["', "c"]


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4, unique=True), max_size=3))
def test_every_combination_once(values: list[list[int]]) -> None:
    axes = [Axis(f"key{number}", tuple(map(str, some))) for number, some in enumerate(values)]
    found = list(combinations(axes))
    assert len(found) == math.prod(map(len, values))
    assert len({tuple(one.items()) for one in found}) == len(found)
    assert all(one[axis.key] in axis.values for one in found for axis in axes)


def test_axes_and_their_short_names() -> None:
    axes = parse_axes(["--model.optim.lr=1e-3,3e-3", "model.backbone.mixers=[s4d],[{name: mamba2, expand: 1}]"])
    assert axes[1].values == ("[s4d]", "[{name: mamba2, expand: 1}]")
    assert short_names([axis.key for axis in axes]) == {"model.optim.lr": "lr", "model.backbone.mixers": "mixers"}
    assert short_names(["a.b.lr", "c.lr"]) == {"a.b.lr": "b.lr", "c.lr": "c.lr"}
    for wrong, said in ((["lr"], "is not KEY=V1,V2"), (["a=1,1"], "'1' twice"), (["a=1", "a=2"], "comes twice")):
        with pytest.raises(CommandError, match=said):
            parse_axes(wrong)
