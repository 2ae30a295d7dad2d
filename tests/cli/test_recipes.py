from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlong.cli.errors import CommandError
from mmlong.cli.recipes import load_recipe, load_recipes, main_recipes, merge, packaged

TREES = st.recursive(
    st.integers() | st.lists(st.integers()), lambda below: st.dictionaries(st.sampled_from("abc"), below), max_leaves=8
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES)


def test_every_recipe_has_a_debug_size_with_a_run_folder_of_its_own() -> None:
    names = main_recipes()
    assert {"image/cells256", "image/defects256", "image/mnist784"} <= set(names)
    for name in names:
        assert f"{name}.debug" in packaged()
        assert load_recipes([name])["recipe"] == name
        assert load_recipes([name, f"{name}.debug"])["recipe"] == f"{name}.debug"


def test_a_real_file_comes_before_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image").mkdir()
    Path("image/cells256").write_text("mine: 1\n")
    assert load_recipe("image/cells256") == ("cells256", {"mine": 1})


@given(MAPPINGS, MAPPINGS)
def test_merging_keeps_every_key_and_the_later_value(base: dict, over: dict) -> None:
    merged = merge(base, over)
    assert merged.keys() == base.keys() | over.keys()
    for key, value in over.items():
        if not isinstance(value, dict):
            assert merged[key] == value
        elif isinstance(base.get(key), dict):
            assert merged[key] == merge(base[key], value)
    assert merge(merged, over) == merged


def test_another_class_brings_its_own_arguments() -> None:
    base = {"model": {"class_path": "a.A", "init_args": {"x": 1}}}
    assert merge(base, {"model": {"init_args": {"y": 2}}})["model"]["init_args"] == {"x": 1, "y": 2}
    assert merge(base, {"model": {"class_path": "b.B"}}) == {"model": {"class_path": "b.B"}}


def test_numbers_in_exponent_form_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1e-3\nb: 2E+5\nc: 1.5e2\nd: e3\ne: 1e\n")
    assert load_recipe(str(path))[1] == {"a": 0.001, "b": 200000.0, "c": 150.0, "d": "e3", "e": "1e"}


@pytest.mark.parametrize(
    ("content", "said"),
    [("a: [1\n", "is no YAML"), ("- 1\n", "holds list"), ("a: !!python/object/apply:os.getcwd []\n", "is no YAML")],
)
def test_a_file_that_is_no_recipe(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(CommandError, match=said):
        load_recipe(str(path))


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(CommandError, match="did you mean 'image/cells256'"):
        load_recipe("image/cell256")
