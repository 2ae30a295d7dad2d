"""What is promised of our mixers against other people's. Who they are and how both sides are built is known to :mod:`mmlong.bench.peers`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contest:
    """One promise, at the default size.

    Attributes:
        peer: registered peer, whose mixer ours is.
        ratio: how many times faster ours must be.
        memory: most bytes that our process may take in all.
    """

    peer: str
    ratio: float
    memory: int


CONTESTS: dict[str, Contest] = {
    "mamba2": Contest("mamba2-transformers", ratio=4.0, memory=2 << 30),
    # 512 tokens to each side. Theirs takes 8 to 22 GB at the default size.
    "local": Contest("longformer", ratio=6.0, memory=3 << 30),
}
