"""Planted faults: classes of a test module that say which property they break, and in which variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmlong.testing import ConformanceError, check_mixer
from mmlong.testing.example import DecayingSum

SLOW = ("cost", "compile", "export")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "planted" in metafunc.fixturenames:
        metafunc.parametrize("planted", [p for cls in vars(metafunc.module).values() for p in _variants(cls)])


def _variants(cls: Any) -> list[Any]:
    if not (isinstance(cls, type) and issubclass(cls, DecayingSum) and "breaks" in vars(cls)):
        return []
    found = []
    for attributes in vars(cls).get("variants", ({},)):
        told = [str(getattr(v, "__name__", getattr(v, "cost", v))) for v in attributes.values()]
        fault = type(cls.__name__, (cls,), attributes)
        marks = pytest.mark.slow if cls.breaks in SLOW else ()
        found.append(pytest.param((fault, cls.breaks), id="-".join([cls.__name__, *told]), marks=marks))
    return found


@pytest.fixture
def refuse() -> Callable[[type, str], None]:
    """Asserts that check_mixer refuses a fault by the name of the property."""

    def check(fault: type, prop: str) -> None:
        with pytest.raises(ConformanceError) as caught:
            check_mixer(fault, dims=(16,))
        assert caught.value.property == prop, str(caught.value)
        assert f"{fault.__name__} (dim 16) breaks the contract: {prop}: " in str(caught.value)

    return check
