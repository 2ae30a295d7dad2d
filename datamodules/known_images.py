"""The image sources that have a name; each is a `Known` in a module of its own."""

from __future__ import annotations

import dataclasses

from . import cifar10, elpv, mnist5k, photos
from .sources import Known

KNOWN: dict[str, Known] = {
    "elpv": elpv.KNOWN,
    "mnist5k": mnist5k.KNOWN,
    "photos": photos.KNOWN,
    "photos-grey": dataclasses.replace(photos.KNOWN, channels=1, size=32),
    **cifar10.KNOWN,
}
"""``photos-grey`` stands in for grey CIFAR-10 where that is not at hand: crops of the same size, whose label is the photograph."""
