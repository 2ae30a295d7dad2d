"""The image sources that have a name; each is a `Known` in a module of its own."""

from __future__ import annotations

from . import elpv, mnist5k, photos
from .sources import Known

KNOWN: dict[str, Known] = {"elpv": elpv.KNOWN, "mnist5k": mnist5k.KNOWN, "photos": photos.KNOWN}
