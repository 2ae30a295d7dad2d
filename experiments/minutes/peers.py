"""Other people's layers in a backbone of ours: a mixer that wraps a peer of ``mmlong bench``, and the two objectives that know of it.

    model.class_path: mmlong.experiments.minutes.peers.PeerClassifyTask
    model.backbone.mixers: [{name: peer, peer: mamba2-transformers, expand: 1, headdim: 16}]

A peer begins with the weights that ours would have (:mod:`mmlong.bench.peer`), so where the two compute the same function only speed, and with it the number of steps that the minutes hold, tells them apart. Options are those of our mixer.

The mixer is registered when one of these objectives is built, and not before: it is none of mmlong's own. What of the contract it honours: causal only; documents are run one by one (:mod:`mmlong.backbone.documents`); padding stands behind what a causal layer
reads. Its state is the tokens that it has read, all of them, which it reads again with every piece: right, but no way to stream far. A state is of full rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlong.backbone.documents import each_document
from mmlong.bench.peers import PEERS
from mmlong.layout import Layout
from mmlong.mixers import MIXERS, Mixer, State, Traits
from mmlong.tasks import AutoregressTask, ClassifyTask


class PeerMixer(Mixer):
    """Somebody else's layer of one of our mechanisms.

    Args:
        dim: width D.
        causal: always true.
        peer: its name in ``mmlong bench peers``.
        options: of our mixer of that mechanism, which fix the shapes.

    Raises:
        ValueError: a peer that sees both sides, or that is not called with the tokens alone.
        MissingPackageError: its package is not installed.
    """

    traits = Traits(paper="whatever the peer's is", state="growing", cost="n^2")

    def __init__(self, dim: int, *, causal: bool = True, peer: str, **options: Any) -> None:
        super().__init__(dim, causal=causal)
        known = PEERS[peer]
        if known.direction != "causal":
            raise ValueError(f"peer {peer!r} sees both sides; this mixer takes causal ones")
        pair = known.pair(dim, options)
        if pair.run_theirs is not pair.theirs:
            raise ValueError(f"peer {peer!r} is called with more than the tokens, which this mixer does not do")
        self.peer = peer
        self.theirs = pair.theirs

    def state_bytes(self, length: int) -> int:
        return 4 * self.dim * length

    def mix(self, x: Tensor, state: State, layout: Layout | None) -> tuple[Tensor, State]:
        if state is None:
            # Padding is behind all that a causal layer reads, so rows of one document need not be taken apart.
            split = layout is not None and layout.resets is not None
            return each_document(self.theirs, x, layout) if split else self.theirs(x), {"read": x}
        if layout is not None and (layout.resets is not None or layout.lengths is not None):
            raise ValueError(f"peer {self.peer!r} goes on with full rows of one document only: leave model.segment out")
        past = state["read"].to(x.dtype)
        known = torch.cat([past, x], 1)
        y: Tensor = self.theirs(known)[:, past.shape[1] :]
        return y, {"read": known}


def register() -> None:
    """Make ``{name: peer, ...}`` known to this process."""
    if "peer" not in MIXERS:
        MIXERS.register("peer")(PeerMixer)


class PeerClassifyTask(ClassifyTask):
    """:class:`~mmlong.tasks.ClassifyTask` that knows the mixer ``peer``."""

    def both_sides(self, modality: dict[str, Any], head: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """As the base's; the model is built next."""
        register()
        return super().both_sides(modality, head, info)


class PeerAutoregressTask(AutoregressTask):
    """:class:`~mmlong.tasks.AutoregressTask` that knows the mixer ``peer``."""

    def both_sides(self, modality: dict[str, Any], head: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """As the base's; the model is built next."""
        register()
        return super().both_sides(modality, head, info)
