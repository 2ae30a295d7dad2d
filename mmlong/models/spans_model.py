"""What the models of several modalities in one sequence share: names, orders, and how raw tensors become rows of spans.

What each modality has beside its tokens, and what is predicted, is the kind's: :class:`mmlong.models.JointModel` reads from left to right, :class:`mmlong.models.JointMaskedModel` from both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.mixers import Mixer
from mmlong.modalities import Modality
from mmlong.models.model import Config, Model
from mmlong.models.spans import Spans, lay_spans
from mmlong.registry import nearest


class SpansModel(Model):
    """Base of the models whose rows are spans of several modalities.

    Attributes:
        voices: what belongs to each modality, by name; each has ``modality``, ``head`` and ``options`` (of the head, complete).
        orders: the orders that a row may have.
    """

    parts = ("modalities", "backbone")
    own_parts: tuple[str, ...] = ("heads", "orders")
    voices: Any
    orders: list[list[str]]

    def find_modalities(self, config: Config, what: str, make: Callable[[str, dict[str, Any], dict[str, Any]], nn.Module]) -> None:  # fmt: skip
        """Make the voices and the orders, and complete the configuration.

        Args:
            config: of the model.
            what: it is, for messages.
            make: from name, options of the modality and of the head to a voice.

        Raises:
            ValueError: the backbone reads codes or a grid, there is no modality, or a name that none has.
        """
        if self.backbone.reads_codes or self.backbone.config.reverse_complement:
            raise ValueError(f"the backbone reads the codes or strands of one modality, and {what} has several")
        self.reads_codes = False
        for module in self.backbone.modules():
            if isinstance(module, Mixer) and module.traits.grid:
                raise ValueError(
                    f"{type(module).__name__} reads a grid, and a row of spans has none: take a mixer of sequences (`mmlong mixers` shows which)"
                )
        names = list(config["modalities"])
        if not names:
            raise ValueError(f"{what} has at least one modality: give modalities, {{name: {{name: ..., ...}}}}")
        orders = config.get("orders") or [names]
        named = [(part, config.get(part) or {}) for part in self.own_parts if part != "orders"]
        for part, given in (*named, *(("orders", order) for order in orders)):
            for name in given:
                self._known(name, names, part)
        for order in orders:
            if len(set(order)) != len(order) or not order:
                raise ValueError(f"orders has {order}; an order names one modality or more, none twice")
        self.voices = nn.ModuleDict()
        for name, options in config["modalities"].items():
            try:
                self.voices[name] = make(name, options, (config.get("heads") or {}).get(name) or {})
            except KeyError as error:  # torch's own reasons: a dot, an empty name, a method of the dict
                raise ValueError(f"modalities has {name!r}, which cannot be a name here: {error.args[0]}") from error
        config["heads"] = {name: voice.options for name, voice in self.voices.items()}
        config["orders"] = [list(order) for order in orders]
        self.orders = config["orders"]

    @staticmethod
    def _known(name: str, names: Sequence[str], part: str) -> None:
        if name not in names:
            raise ValueError(f"{part} has {name!r}{nearest(name, names)}; the modalities are {', '.join(names)}")

    @property
    def modality(self) -> Modality:  # type: ignore[override]
        """Each voice has one; what asks for the model's is for models of one modality, and gets a clear answer."""
        raise ValueError(
            f"this is for models of one modality, and a joint model has {', '.join(self.names)}: model.voices[name].modality"
        )

    @property
    def names(self) -> list[str]:
        """Names of the modalities, in the order of their numbers."""
        return list(self.voices)

    def tokens_per_sample(self) -> int | None:
        """Tokens of every row, where all orders have as many; else ``None``."""
        each = {name: voice.modality.tokens_per_sample() for name, voice in self.voices.items()}
        totals = {None if None in (found := [each[n] for n in order]) else sum(found) for order in self.orders}
        return totals.pop() if len(totals) == 1 else None

    def encode(  # type: ignore[override]
        self,
        raw: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor] | None = None,
        orders: Sequence[Sequence[str]] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Spans, Layout]:
        """Raw tensors to spans and their layout.

        Args:
            raw: by modality, as the modality takes it. Not all have to be there.
            lengths: by modality, int64, how much of each is valid; of those that are uneven.
            orders: of each row; ``None``: the first of the model's for all.
            rows: by modality, int64 ``(n,)``, in which rows of the batch its ``n`` raw tensors stand; of those that are not in every row.
            counted: bool ``(B,)``, rows that have tokens at all; ``None``: all.

        Raises:
            ValueError: no such modality, or rows that do not fit.
        """
        lengths, rows = lengths or {}, rows or {}
        for name in raw:
            self._known(name, self.names, "the batch")
        sizes = {int(raw[name].shape[0]) for name in raw if name not in rows}
        if orders is not None:
            sizes.add(len(orders))
        if len(sizes) != 1:
            raise ValueError(
                f"the modalities of a batch have {sorted(sizes)} rows; where not all are in each, say rows and orders"
            )
        (batch,) = sizes
        device = next(iter(raw.values())).device
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, voice in self.voices.items():
            modality = voice.modality
            if name not in raw:
                nothing = torch.zeros(batch, dtype=torch.int64, device=device)
                parts[name] = blank(modality, nothing[:, None][:, :0]), nothing
                continue
            tokens, layout = modality.encode(raw[name], lengths.get(name), None)
            valid = layout.lengths
            if valid is None:
                valid = torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int64, device=device)
            if name in rows:
                there = torch.zeros(batch, dtype=torch.int64, device=device).index_put((rows[name],), valid)
                tokens = tokens.new_zeros(batch, *tokens.shape[1:]).index_put((rows[name],), tokens)
                valid = there
            parts[name] = tokens, valid if counted is None else valid.masked_fill(~counted, 0)
        return lay_spans(parts, [self.orders[0]] * batch if orders is None else orders)

    # timm's verbs

    def forward_head(self, x: Tensor, layout: Layout | None = None, pre_logits: bool = False) -> Tensor:
        """Of one modality only: ``model.voices[name].head``."""
        raise ValueError("a joint model has a head for each modality: model.voices[name].head")

    def reset_classifier(self, num_classes: int, **options: Any) -> None:
        """A joint model predicts tokens."""
        raise ValueError("a joint model has a head for each modality, and none that classifies")

    def get_classifier(self) -> nn.Module:
        """A joint model predicts tokens."""
        raise ValueError("a joint model has a head for each modality: model.voices[name].head")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the plain model's; the stems are those of the voices."""
        return {**super().group_matcher(coarse), "stem": r"^voices\.[^.]+\.(?:modality\b|start$|mask$|mark$)"}


def blank(modality: Modality, like: Tensor) -> Tensor:
    """No tokens of a modality, ``(B, L, ...)``: what stands where a row is of another."""
    shape = like.shape[:2]
    if modality.codes is not None:
        return torch.zeros(shape, dtype=torch.int64, device=like.device)
    return torch.zeros(*shape, modality.channels, device=like.device)
