"""Masked models: some tokens hidden, and a prediction of what they are from both sides (BERT, Devlin et al. 2019).

    y, state = model(tokens, state, layout, hidden)      hidden (B, L): where a learned vector stands in for the token's value

The vector replaces what a token *is* and not where it stands: its place is added as to any other. Without ``hidden`` a masked model is a plain one, so its features
serve whatever comes after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone
from mmlong.heads import Head
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.modalities import Modality
from mmlong.models.model import Config, Model, register_kind, token_head


def require_both_sides(backbone: Backbone) -> None:
    """Raise ``ValueError`` unless a backbone sees both sides of a token and keeps every one."""
    if backbone.causal:
        raise ValueError(
            "a masked model predicts a token from both sides, and this backbone sees the past only: set backbone.direction to alternate or both"
        )
    if not backbone.per_token:
        raise ValueError(
            f"a masked model predicts every token, and this backbone {backbone.instead}: leave backbone.pool empty, and perceiver out of backbone.parts"
        )


def require_per_token(head: Head, name: str) -> None:
    """Raise ``ValueError`` unless a head predicts every token."""
    if not head.per_token:
        raise ValueError(f"a masked model predicts every token; head {name!r} predicts one thing a sequence")


def guessing_head(modality: Modality, head: dict[str, Any]) -> dict[str, Any]:
    """The options of a head that says what a hidden token is: those given, with what the modality fixes."""
    if modality.codes is not None:
        known: dict[str, Any] = {"name": "categorical", "num_classes": modality.codes}
    else:
        known = {"name": "regress_tokens", "num_classes": modality.channels}
    return token_head(known, head)


@register_kind("masked")
class MaskedModel(Model):
    """Hidden tokens from those on both sides.

    Args:
        config: see :class:`mmlong.models.Model`; the backbone sees both sides and keeps every token, the head predicts every token. ``head`` may be left out:
            ``categorical`` for a modality of codes, else ``regress_tokens``, with the modality's numbers.

    Raises:
        ValueError: the backbone is causal or pools, or the head predicts one thing a sequence.
    """

    def __init__(self, config: Config) -> None:
        config = {**config, "head": config.get("head") or {}, "kind": "masked"}
        super().__init__(config)
        require_both_sides(self.backbone)
        require_per_token(self.head, self.config["head"]["name"])
        # The same on both strands of an equivariant model, or hiding a token would tell which strand is read.
        self.strands = 2 if self.backbone.config.reverse_complement else 1
        self.mask = nn.Parameter(torch.randn(self.backbone.dim_in // self.strands) * 0.02)

    def complete_head(self, head: dict[str, Any]) -> dict[str, Any]:
        """The head's options with what the modality fixes."""
        return guessing_head(self.modality, head)

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` to features ``(B, L, num_features)``; what stands at ``hidden`` (bool ``(B, L)``) plays no part."""
        if hidden is None:
            return super().forward_features(tokens, state, layout)
        values = self.modality.values(tokens)
        values = torch.where(hidden[..., None], self.mask.repeat(self.strands).to(values.dtype), values)
        places = self.modality.places(None, tokens.shape[1])
        # A part that reads codes is told what stands before a document in the place of what is hidden.
        codes = tokens.masked_fill(hidden, -1) if self.reads_codes else None
        return self.backbone(values if places is None else values + places, state, self.told(codes, layout))

    def forward(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Tokens to the head's prediction at every position, and the state."""
        x, state = self.forward_features(tokens, state, layout, hidden)
        return self.forward_head(x, layout), state
