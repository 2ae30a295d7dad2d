"""Every registered modality keeps the contract in every form that it shows; one test for each property, so that a failure names it."""

from __future__ import annotations

import pytest

from mmlong.modalities import MODALITIES
from mmlong.testing import MODALITY_PROPERTY_NAMES, check_modality


@pytest.mark.parametrize("prop", MODALITY_PROPERTY_NAMES)
@pytest.mark.parametrize("name", MODALITIES.names())
def test_conformance(name: str, prop: str) -> None:
    if not check_modality(name, only=prop):
        why = {"padding": "takes no lengths", "resets": "takes no resets", "set": "is no set"}
        pytest.skip(f"{name} {why[prop]}")
