"""Base of the parts that lay a whole document out and see both its sides: latents, learned tokens, soft blocks. Each document is a row of its own (:mod:`mmlong.ops.documents`), whatever batch it comes in."""

from __future__ import annotations

from torch import Tensor, nn

from mmlong.backbone.part import Part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.ops.documents import Documents, documents_of


class TwoSided(Part):
    """A part that sees both sides, and so does not stream. Subclasses define :meth:`run`.

    Args:
        inner: parts that see both sides, too.

    Raises:
        ValueError: parts that are causal. When called: a state.
    """

    causal = False  # type: ignore[assignment]
    streaming = False  # type: ignore[assignment]

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        if inner.causal:
            raise ValueError(
                f"{type(self).__name__} shows every token both sides of its document, and the parts inside are causal: set backbone.direction to both"
            )

    def run(self, documents: Documents) -> Tensor:
        """``documents.rows (N, T, D)`` to ``(N, T, D)``."""
        raise TypeError(f"{type(self).__name__} does not define run(documents)")

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, no state."""
        if state is not None:
            raise ValueError(f"{type(self).__name__} was given a state but has none: it sees both sides")
        documents = documents_of(x, layout)
        return documents.back(self.run(documents)), None
