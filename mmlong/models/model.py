"""The model: modality + backbone + head as one module, with timm's verbs, made from a plain configuration.

A model has the contract's own signature, ``y, state = model(tokens, state, layout)``, where ``tokens, layout = model.encode(raw)``. Its configuration is a
nested dict of plain values. What a model computes from its parts can differ (``kind``): :class:`Model` itself is the plain one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig, Resampled
from mmlong.backbone.time_step import require_all, survey
from mmlong.heads import HEADS, CategoricalHead, Head, create_head
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.mixers.contract import check_factor
from mmlong.modalities import MODALITIES, Modality, create_modality
from mmlong.models.intermediates import forward_intermediates
from mmlong.registry import Registry, check_options, nearest

Config = dict[str, Any]


class Model(nn.Module):
    """Modality, backbone and head as one module.

    Args:
        config: ``{"modality": {"name": ..., **options}, "backbone": {...BackboneConfig}, "head": {"name": ..., **options}}``; ``kind`` names a subclass.

    Attributes:
        config: the complete configuration, JSON-able.
        num_features: width of the features before the head.
        class_names: of a classifier, by class id; empty where nobody said. Saved and loaded with it.
    """

    parts: tuple[str, ...] = ("modality", "backbone", "head")
    """Keys that the configuration must have."""
    own_parts: tuple[str, ...] = ()
    """Further keys that the configuration of this kind may have."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        known = (*self.parts, *self.own_parts)
        for key in config:
            if key not in (*known, "kind"):
                raise TypeError(
                    f"a model configuration has no part {key!r}{nearest(key, known)}; it has: {', '.join(known)}"
                )
        if missing := [key for key in self.parts if key not in config]:
            raise ValueError(f"the model configuration lacks {', '.join(missing)}")
        config = copy.deepcopy(config)
        check_options("backbone", BackboneConfig, config["backbone"])
        backbone = BackboneConfig(**config["backbone"])
        config["backbone"] = dataclasses.asdict(backbone)
        self.config = config
        self.backbone = Backbone(backbone)
        self.num_features = self.backbone.num_features
        self.class_names: list[str] = []
        self.make(config)

    def make(self, config: Config) -> None:
        """What stands on both sides of the backbone, which is there already, from the configuration, which is completed."""
        if self.backbone.config.reverse_complement:
            # Features are equivariant only where the embedding is: both sides of it are known here alone.
            if "reverse_complement" not in inspect.signature(MODALITIES[config["modality"]["name"]]).parameters:
                raise ValueError(f"backbone.reverse_complement is for DNA; {config['modality']['name']} has no strands")
            config["modality"].setdefault("reverse_complement", True)
        self.modality: Modality = create_modality(dim=self.backbone.dim_in, **config["modality"])
        self.reads_codes = bool(self.backbone.reads_codes)
        for kind in self.backbone.reads_codes:
            if self.modality.codes is None or kind not in ("any", self.modality.kind):
                raise ValueError(
                    f"the backbone reads the codes of {'whole numbers' if kind == 'any' else kind}, and modality {config['modality']['name']!r} has none"
                )
        config["head"] = self.complete_head(config["head"])
        length = self.backbone.length_out(self.modality.tokens_per_sample())
        if length is not None and "tokens" in inspect.signature(HEADS[config["head"]["name"]]).parameters:
            # A head that reads every position must know how many there are; only the model knows both sides.
            config["head"].setdefault("tokens", length)
        self.head: Head = create_head(dim=self.num_features, **config["head"])
        self._tie()

    def _tie(self) -> None:
        if isinstance(self.head, CategoricalHead):
            self.head.tie(self.modality.code_embedding)

    def complete_head(self, head: dict[str, Any]) -> dict[str, Any]:
        """The head's options with what the other parts fix; the modality is there already."""
        return head

    @classmethod
    def from_config(cls, config: Config) -> Model:
        """The same as the constructor, in timm's wording."""
        return cls(config)

    def tokens_per_sample(self) -> int | None:
        """Tokens of every sample, where all have as many; else ``None``."""
        return self.modality.tokens_per_sample()

    @property
    def causal(self) -> bool:
        return self.backbone.causal

    @property
    def streaming(self) -> bool:
        return self.backbone.streaming

    def encode(self, raw: Tensor, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Tensor, Layout]:
        """Raw tensors of the modality to ``(tokens, layout)``; see :meth:`mmlong.modalities.Modality.encode`."""
        return self.modality.encode(raw, lengths, resets)

    def forward_features(
        self, tokens: Tensor, state: State = None, layout: Layout | None = None
    ) -> tuple[Tensor, State]:
        """Tokens ``(B, L, ...)`` to features ``(B, L', num_features)`` after the final norm, unpooled, and the state."""
        return self.backbone(self.modality.embed(tokens, layout), state, self.told(tokens, layout))

    def forward_intermediates(self, tokens: Tensor, layout: Layout | None = None, **options: Any) -> Any:
        """What parts of the backbone give; see :func:`mmlong.models.intermediates.forward_intermediates`."""
        return forward_intermediates(self, tokens, layout, **options)

    def told(self, codes: Tensor | None, layout: Layout | None) -> Layout | None:
        """What the backbone is told of the positions: the layout, with the codes that they are made of where it reads them."""
        return dataclasses.replace(layout or Layout(), codes=codes) if self.reads_codes else layout

    def forward_head(self, x: Tensor, layout: Layout | None = None, pre_logits: bool = False) -> Tensor:
        """Features and *their* layout to the prediction; with ``pre_logits`` what the last linear layer would see."""
        return self.head.pooled(x, layout) if pre_logits else self.head(x, layout)

    def forward(self, tokens: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Tokens to the head's prediction, and the state."""
        x, state = self.forward_features(tokens, state, layout)
        return self.forward_head(x, self.backbone.layout_out(layout, tokens.shape[1])), state

    def resample(self, factor: float, strict: bool = True, rate: int | None = None) -> Resampled:
        """Hear signals at another rate than the model was trained at, by the step of its mixers, in place and without training (:mod:`mmlong.backbone.time_step`).

        Args:
            factor: the old rate over the new: a model trained at 16 kHz hears 8 kHz after ``resample(2)``.
            strict: refuse a model of which a part counts in tokens; otherwise such parts stay as they are and are named in the result.
            rate: what the modality hears from now on, in samples a second; unless told, the old rate over ``factor``, rounded.

        Raises:
            ValueError: a factor that is not above 0 and finite; a modality whose tokens are no samples of a signal in time; a model that predicts tokens, which are other moments at another
                rate (its ``backbone`` alone can be resampled); or, if ``strict``, parts that count in tokens. Nothing has been changed then.
        """
        check_factor(factor)
        if factor == 1:
            return Resampled(1.0, (), {})
        if (kind := self.config.get("kind", "plain")) != "plain":
            raise ValueError(
                f"a model of kind {kind!r} predicts tokens, which at another rate are other moments: train one at that rate"
            )
        systems, left = survey(self.backbone)
        if hasattr(self.head, "tokens"):
            left["head"] = f"reads exactly {self.head.tokens} tokens"
        if strict:
            require_all(left)
        if rate is None:
            rate = round((self.modality.rate or 0) / factor)
        self.modality.resample(rate)
        self.config["modality"]["rate"] = rate
        for mixer in systems.values():
            mixer.resample(factor)
        return Resampled(factor, tuple(systems), left)

    # Saving; see mmlong.models.hub

    def save_pretrained(self, folder: str | Path, run: str | Path | None = None, license: str | None = None) -> None:
        """See :func:`mmlong.models.hub.save_pretrained`."""
        from mmlong.models.hub import save_pretrained

        save_pretrained(self, folder, run, license)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """See :func:`mmlong.models.hub.push_to_hub`."""
        from mmlong.models.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)

    # timm's verbs

    def reset_classifier(self, num_classes: int, **options: Any) -> None:
        """A fresh head of the same kind with another number of classes (0: none)."""
        self.config["head"] = {**self.config["head"], "num_classes": num_classes, **options}
        self.class_names = []
        old = next(self.backbone.parameters())
        self.head = create_head(dim=self.num_features, **self.config["head"]).to(old.device, old.dtype)
        self._tie()

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.linear  # type: ignore[return-value]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: those whose module says so in ``optim_hints``."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            for name, hint in getattr(module, "optim_hints", {}).items()
            if hint.get("weight_decay") == 0.0
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions from stem to head, for layer-wise learning-rate decay."""
        blocks: Any = r"^backbone\.(?:stages|merges)\.(\d+)"
        if not coarse:
            blocks = [
                (r"^backbone\.stages\.(\d+)\.(\d+)", None),
                (r"^backbone\.merges\.(\d+)", (99,)),
                (r"^backbone\.norm", (99999,)),
            ]
        return {"stem": r"^(?:modality\b|start$|mask$)", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward instead of keeping their activations."""
        self.backbone.grad_checkpointing = enable

    def num_parameters(self) -> int:
        """How many parameters train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


KINDS: Registry[type[Model]] = Registry("kind of model", group="mmlong.kinds")
"""What a model computes from its parts: ``plain`` is :class:`Model`, each of the others a subclass in a file of its own."""


def token_head(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a head that predicts tokens.

    Args:
        known: the head that suits the modality, with what the modality fixes.
        given: by the configuration; another name takes nothing of ``known``.
    """
    # Data that has classes says so to every model; where tokens are predicted, a class is a code.
    given = {key: value for key, value in given.items() if key != "num_classes"}
    return {**known, **given} if given.get("name", known["name"]) == known["name"] else given


def register_kind(name: str) -> Callable[[type[Model]], type[Model]]:
    """Class decorator that names a kind of model."""
    return KINDS.register(name)


register_kind("plain")(Model)


def build_model(config: Config) -> Model:
    """The model of a configuration, of the ``kind`` that it names."""
    return KINDS[config.get("kind", "plain")](config)
