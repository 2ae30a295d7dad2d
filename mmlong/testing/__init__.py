"""The conformance suites, public, for people's own parts too.

from mmlong.testing import check_mixer, check_modality
check_mixer("mamba2")                                    # a registered mixer
check_mixer("attention", options={"causal": False})      # its two-sided form
check_mixer(lambda dim: MyMixer(dim, window=8))          # a module of your own
check_mixer(MyMixer, only=["pieces", "resets"])          # while building it
check_modality("image")                                  # a registered modality, in every form it shows
check_modality(lambda dim: MyModality(dim, rate=100))    # one of your own
"""

from __future__ import annotations

from mmlong.testing.mixer import PROPERTIES, PROPERTY_NAMES, check_mixer
from mmlong.testing.modality import MODALITY_PROPERTIES, MODALITY_PROPERTY_NAMES, check_modality
from mmlong.testing.suite import Property
from mmlong.testing.verdicts import ConformanceError

__all__ = [
    "MODALITY_PROPERTIES",
    "MODALITY_PROPERTY_NAMES",
    "PROPERTIES",
    "PROPERTY_NAMES",
    "ConformanceError",
    "Property",
    "check_mixer",
    "check_modality",
]
