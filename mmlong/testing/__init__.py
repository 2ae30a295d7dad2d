"""The conformance suite, public, for people's own parts too.

from mmlong.testing import check_mixer
check_mixer("mamba2")                                    # a registered mixer
check_mixer("attention", options={"causal": False})      # its two-sided form
check_mixer(lambda dim: MyMixer(dim, window=8))          # a module of your own
check_mixer(MyMixer, only=["pieces", "resets"])          # while building it
"""

from __future__ import annotations

from mmlong.testing.mixer import PROPERTIES, PROPERTY_NAMES, Property, check_mixer
from mmlong.testing.subject import ConformanceError

__all__ = ["PROPERTIES", "PROPERTY_NAMES", "ConformanceError", "Property", "check_mixer"]
