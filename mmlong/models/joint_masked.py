"""Masked joint models: several modalities in one sequence of spans, some tokens hidden, and a prediction of what they are from both sides and from all modalities.

    y, state = model(spans, state, layout, hidden)      hidden (B, L): where a learned vector of its modality stands in for the token's value

The rows are those of a joint model (:mod:`mmlong.models.spans`), the objective BERT's (Devlin et al. 2019) over all of them. Each modality has its own stem, head and vector for what is hidden, and one that is added to all its tokens
(BERT's segment embedding), which says what stands there. Hide a whole span and it is predicted from the others: a caption from its picture, all its bytes at once and each by itself, which is the departure from
models that draw one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone
from mmlong.heads import create_head
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.modalities import create_modality
from mmlong.models.masked import guessing_head, require_both_sides, require_per_token
from mmlong.models.model import Config, register_kind
from mmlong.models.spans import Spans
from mmlong.models.spans_model import SpansModel


class MaskedVoice(nn.Module):
    """What a masked joint model has of one modality.

    Args:
        modality, head: ``{name: ..., option: ...}``.
        backbone: between the two; not kept.

    Attributes:
        mask: ``(D,)``, stands where a token is hidden.
        mark: ``(D,)``, added to every token.
        options: of the head, complete.
    """

    def __init__(self, modality: dict[str, Any], head: dict[str, Any], backbone: Backbone) -> None:
        super().__init__()
        self.modality = create_modality(dim=backbone.dim_in, **modality)
        self.options = guessing_head(self.modality, head)
        self.head = create_head(dim=backbone.num_features, **self.options)
        require_per_token(self.head, self.options["name"])
        self.mask = nn.Parameter(torch.randn(backbone.dim_in) * 0.02)
        self.mark = nn.Parameter(torch.randn(backbone.dim_in) * 0.02)


@register_kind("joint_masked")
class JointMaskedModel(SpansModel):
    """Hidden tokens of several modalities from those on both sides.

    Args:
        config: ``{"kind": "joint_masked", "modalities": {name: {"name": ..., **options}}, "backbone": {...}}``, the backbone sees both sides and keeps every token. May have ``heads`` (by name, options of each;
            left out, ``categorical`` for codes and ``regress_tokens`` for real values) and ``orders`` (lists of names: which spans a row may have, and in which order; left out, all as they stand).

    Attributes:
        voices: what belongs to each modality, by name.
        orders: the orders that a row may have.

    Raises:
        ValueError: the backbone is causal or pools, or reads codes or a grid, a name that no modality has, or a head that predicts one thing a sequence.
    """

    def __init__(self, config: Config) -> None:
        super().__init__({**config, "kind": "joint_masked"})

    def make(self, config: Config) -> None:
        """The voices."""
        require_both_sides(self.backbone)
        self.find_modalities(
            config, "a joint model", lambda name, options, head: MaskedVoice(options, head, self.backbone)
        )

    def forward_features(  # type: ignore[override]
        self, spans: Spans, state: State = None, layout: Layout | None = None, hidden: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Spans to features ``(B, L, num_features)``; what stands at ``hidden`` (bool ``(B, L)``) plays no part."""
        like = next(iter(self.voices.values())).mask
        x = like.new_zeros(*spans.kind.shape, self.backbone.dim_in)
        for name, voice in self.voices.items():
            rows, columns = spans.where(name)
            mine = voice.modality.values(spans.pick(name))[0]
            if hidden is not None:
                mine = torch.where(hidden[rows, columns, None], voice.mask.to(mine.dtype), mine)
            index = spans.index[rows, columns][None]
            places = voice.modality.places(index, index.shape[1])
            beside = voice.mark if places is None else voice.mark + places[0]
            # Where a modality is not in the batch, this is of no tokens: its parameters still have a gradient, of zeros, as DDP wants it.
            x = x.index_put((rows, columns), (mine + beside).to(x.dtype))
        return self.backbone(x, state, layout)

    def guess(self, x: Tensor, spans: Spans, chosen: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality, the head's prediction ``(1, N, ...)`` of the ``N`` chosen tokens (bool ``(B, L)``) that the batch has of it, row by row, and what they are.

        Args:
            x: features, as :meth:`forward_features` gives them.
            spans: with the tokens as they are.
            chosen: bool ``(B, L)``.
        """
        found = {}
        for number, (name, voice) in enumerate(self.voices.items()):
            here = chosen & (spans.kind == number)
            found[name] = voice.head(x[here][None]), spans.tokens[name][here][None]
        return found

    def forward(  # type: ignore[override]
        self, spans: Spans, state: State = None, layout: Layout | None = None, hidden: Tensor | None = None
    ) -> tuple[dict[str, Tensor], State]:
        """Spans to each head's prediction of every token of its modality ``(1, N, ...)``, row by row, and the state."""
        x, after = self.forward_features(spans, state, layout, hidden)
        everywhere = torch.ones_like(spans.kind, dtype=torch.bool)
        return {name: prediction for name, (prediction, _) in self.guess(x, spans, everywhere).items()}, after
