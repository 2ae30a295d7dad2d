"""What a causal model has of one modality: its stem, its start vector, its head and, where the modality has numbers, a linear prediction.

An autoregressive model is one voice on a backbone (:mod:`mmlong.models.autoregressive`), a joint model several on the same (:mod:`mmlong.models.joint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.backbone import Backbone
from mmlong.heads import Head, LogisticMixtureHead, create_head
from mmlong.mixers import State
from mmlong.modalities import Modality, create_modality
from mmlong.models.linear_prediction import LinearPrediction
from mmlong.models.model import token_head


def predicting_head(modality: Modality, head: dict[str, Any]) -> dict[str, Any]:
    """The options of a head that gives the modality's tokens a probability: those given, with what the modality fixes.

    Raises:
        ValueError: its tokens have none.
    """
    if modality.codes is not None:
        known: dict[str, Any] = {"name": "categorical", "num_classes": modality.codes}
    elif modality.levels is not None:
        known = {"name": "logistic_mixture", "channels": modality.channels, "levels": modality.levels}
    else:
        raise ValueError(f"tokens of {type(modality).__name__} are real numbers without levels and have no probability")
    return token_head(known, head)


class Voice:
    """A mixin of modules that predict the tokens of a modality.

    Attributes:
        modality, head: its own.
        start: ``(D,)``, what the backbone is given where there is no token before; ``None`` where that is a code of the modality, ``start_code``.
        linear: moves the means of a mixture by a linear function of earlier tokens, or ``None``.
    """

    modality: Modality
    head: Head
    start: nn.Parameter | None
    start_code: int | None
    linear: LinearPrediction | None

    def find_voice(
        self, dim: int, head_name: str, offsets: Sequence[int] | None, start_code: int | None = None, each: bool = False
    ) -> None:
        """Make what stands beside modality and head, which are there already.

        Args:
            dim: width of the vectors that the backbone is given.
            head_name: for messages.
            offsets: of the linear prediction; ``None`` or empty: none.
            start_code: stands before the first token in place of a learned vector.
            each: whether each component of the mixture has a linear function of its own.

        Raises:
            ValueError: the head predicts no tokens, linear prediction of codes, or a start that is no code.
        """
        if not self.head.per_token:
            raise ValueError(
                f"an autoregressive model predicts every token; head {head_name!r} predicts one thing a sequence"
            )
        self.start = nn.Parameter(torch.randn(dim) * 0.02) if start_code is None else None
        self.start_code = start_code
        if start_code is not None:
            table = self.modality.code_embedding
            if table is None or not 0 <= start_code < table.num_embeddings:
                raise ValueError(
                    f"start is a code that the modality embeds{'' if table is None else f', 0 .. {table.num_embeddings - 1}'}; got {start_code} for {type(self.modality).__name__}"
                )
        self.linear = None
        if offsets:
            if not isinstance(self.head, LogisticMixtureHead):
                raise ValueError(
                    "linear_prediction moves the means of head logistic_mixture; codes have no order to predict along"
                )
            self.linear = LinearPrediction(self.modality.channels, offsets, self.head.mixtures if each else None)
            self.head.centre()

    def start_vector(self) -> Tensor:
        """What stands before the first token, ``(D,)``."""
        if self.start is not None:
            return self.start
        code = torch.tensor([[self.start_code]], device=next(self.modality.parameters()).device)
        return self.modality.values(code)[0, 0]

    def tail(self, state: State, like: Tensor) -> Tensor:
        """The tokens before this piece that a linear prediction needs: ``(B, reach, C)``."""
        assert self.linear is not None
        if state is None:
            return like.new_zeros(like.shape[0], self.linear.reach, like.shape[2])
        return state["tokens"].to(like.dtype)

    def kept(self, state: State, tokens: Tensor, valid: Tensor) -> Tensor:
        """The tail after ``valid (B,)`` of these tokens."""
        assert self.linear is not None
        kept = valid[:, None] + torch.arange(self.linear.reach, device=tokens.device)
        whole = torch.cat([self.tail(state, tokens), tokens], 1)
        return whole.gather(1, kept[..., None].expand(-1, -1, whole.shape[-1]))

    def moved(self, prediction: Tensor, before: Tensor, length: int, index: Tensor) -> Tensor:
        """The prediction at ``length`` positions with the linear one's means; see :class:`LinearPrediction`."""
        assert self.linear is not None
        assert isinstance(self.head, LogisticMixtureHead)
        return self.head.move(prediction, self.linear(before, length, index))


class JointVoice(Voice, nn.Module):
    """One of the voices of a joint model.

    Args:
        modality, head: ``{name: ..., option: ...}``.
        backbone: that it speaks through; not kept.
        linear_prediction: offsets, or ``None``.

    Attributes:
        options: of the head, complete.
    """

    def __init__(
        self,
        modality: dict[str, Any],
        head: dict[str, Any],
        backbone: Backbone,
        linear_prediction: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.modality = create_modality(dim=backbone.dim_in, **modality)
        self.options = predicting_head(self.modality, head)
        self.head = create_head(dim=backbone.num_features, **self.options)
        self.find_voice(backbone.dim_in, self.options["name"], linear_prediction)

    def add_to_tokens(self, begun: Tensor, index: Tensor) -> Tensor:
        """What the backbone is given of tokens beside the value of the one before: their places, and the start vector at the first of a span.

        Args:
            begun: bool ``(1, N)``, the first of a span.
            index: int64 ``(1, N)``, how many of the span come before.

        Returns:
            ``(1, N, D)``.
        """
        start = self.start_vector()
        added = torch.where(begun[..., None], start, torch.zeros_like(start))
        places = self.modality.places(index, index.shape[1])
        return added if places is None else added + places
