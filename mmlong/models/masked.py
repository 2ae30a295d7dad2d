"""Masked models: some tokens hidden, and a prediction of what they are from both sides (BERT, Devlin et al. 2019).

    y, state = model(tokens, state, layout, hidden)      hidden (B, L): where a learned vector stands in for the token's value

The vector replaces what a token *is* and not where it stands: its place is added as to any other. Without ``hidden`` a masked model is a plain one, so its features
serve whatever comes after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.models.model import Config, Model, register_kind, token_head


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
        if self.backbone.causal:
            raise ValueError(
                "a masked model predicts a token from both sides, and this backbone sees the past only: set backbone.direction to alternate or both"
            )
        if not self.backbone.per_token:
            raise ValueError(
                f"a masked model predicts every token, and this backbone {self.backbone.instead}: leave backbone.pool empty, and perceiver out of backbone.parts"
            )
        if not self.head.per_token:
            raise ValueError(
                f"a masked model predicts every token; head {self.config['head']['name']!r} predicts one thing a sequence"
            )
        # The same on both strands of an equivariant model, or hiding a token would tell which strand is read.
        self.strands = 2 if self.backbone.config.reverse_complement else 1
        self.mask = nn.Parameter(torch.randn(self.backbone.dim_in // self.strands) * 0.02)

    def complete_head(self, head: dict[str, Any]) -> dict[str, Any]:
        """The head's options with what the modality fixes."""
        modality = self.modality
        if modality.codes is not None:
            known: dict[str, Any] = {"name": "categorical", "num_classes": modality.codes}
        else:
            known = {"name": "regress_tokens", "num_classes": modality.channels}
        return token_head(known, head)

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` to features ``(B, L, num_features)``; what stands at ``hidden`` (bool ``(B, L)``) plays no part."""
        if hidden is None:
            return super().forward_features(tokens, state, layout)
        values = self.modality.values(tokens)
        values = torch.where(hidden[..., None], self.mask.repeat(self.strands).to(values.dtype), values)
        places = self.modality.places(None, tokens.shape[1])
        return self.backbone(values if places is None else values + places, state, layout)

    def forward(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Tokens to the head's prediction at every position, and the state."""
        x, state = self.forward_features(tokens, state, layout, hidden)
        return self.forward_head(x, layout), state
