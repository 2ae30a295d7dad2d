"""Models: modality + backbone + head, with timm's verbs, made from a plain configuration and saved without pickles.

A model has the contract's own signature, ``y, state = model(tokens, state, layout)``, where ``tokens, layout = model.encode(raw)``. Its configuration is a
nested dict of plain values, so a folder with ``config.json`` and ``model.safetensors`` is all it takes to have it back.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlong.backbone import Backbone, BackboneConfig
from mmlong.heads import HEADS, Head, create_head
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.modalities import Modality, create_modality
from mmlong.registry import Registry, check_options, nearest

Config = dict[str, Any]


class Model(nn.Module):
    """Modality, backbone and head as one module.

    Args:
        config: ``{"modality": {"name": ..., **options}, "backbone": {...BackboneConfig}, "head": {"name": ..., **options}}``.

    Attributes:
        config: the complete configuration, JSON-able.
        num_features: width of the features before the head.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        parts = ("modality", "backbone", "head")
        for key in config:
            if key not in parts:
                raise TypeError(
                    f"a model configuration has no part {key!r}{nearest(key, parts)}; it has: {', '.join(parts)}"
                )
        if missing := [key for key in parts if key not in config]:
            raise ValueError(f"the model configuration lacks {', '.join(missing)}")
        config = copy.deepcopy(config)
        check_options("backbone", BackboneConfig, config["backbone"])
        backbone = BackboneConfig(**config["backbone"])
        config["backbone"] = dataclasses.asdict(backbone)
        self.config = config
        self.backbone = Backbone(backbone)
        self.num_features = self.backbone.num_features
        self.modality: Modality = create_modality(dim=self.backbone.dim_in, **config["modality"])
        length = self.modality.tokens_per_sample()
        if length is not None and "tokens" in inspect.signature(HEADS[config["head"]["name"]]).parameters:
            # A head that reads every position must know how many there are; only the model knows both sides.
            config["head"].setdefault("tokens", -(-length // self.backbone.stride))
        self.head: Head = create_head(dim=self.num_features, **config["head"])

    @classmethod
    def from_config(cls, config: Config) -> Model:
        """The same as the constructor, in timm's wording."""
        return cls(config)

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
        return self.backbone(self.modality.embed(tokens, layout), state, layout)

    def forward_head(self, x: Tensor, layout: Layout | None = None, pre_logits: bool = False) -> Tensor:
        """Features and *their* layout to the prediction; with ``pre_logits`` what the last linear layer would see."""
        return self.head.pooled(x, layout) if pre_logits else self.head(x, layout)

    def forward(self, tokens: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """Tokens to the head's prediction, and the state."""
        x, state = self.forward_features(tokens, state, layout)
        return self.forward_head(x, self.backbone.layout_out(layout, tokens.shape[1])), state

    # timm's verbs

    def reset_classifier(self, num_classes: int, **options: Any) -> None:
        """A fresh head of the same kind with another number of classes (0: none)."""
        self.config["head"] = {**self.config["head"], "num_classes": num_classes, **options}
        old = next(self.backbone.parameters())
        self.head = create_head(dim=self.num_features, **self.config["head"]).to(old.device, old.dtype)

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
        return {"stem": r"^modality", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward instead of keeping their activations."""
        self.backbone.grad_checkpointing = enable

    def num_parameters(self) -> int:
        """How many parameters train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


MODELS: Registry[Callable[..., Config]] = Registry("model", group="mmlong.models")
"""Names to functions that return a model configuration."""


def register_model(name: str) -> Callable[[Callable[..., Config]], Callable[..., Config]]:
    """Decorator for a function that returns a model configuration; its keywords are what ``create_model`` takes."""
    return MODELS.register(name)


def create_model(name: str, **options: Any) -> Model:
    """A named model, e.g. ``create_model("pixel_pyramid", size=[64, 64], num_classes=10)``."""
    return Model(MODELS.create(name, **options))


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` knows."""
    return MODELS.names(pattern)


@register_model("pixel_pyramid")
def pixel_pyramid(
    size: list[int] | tuple[int, int] = (256, 256),
    channels: int = 1,
    num_classes: int = 2,
    dim: tuple[int, ...] | list[int] = (16, 48, 96),
    depth: tuple[int, ...] | list[int] = (1, 1, 4),
    pool: tuple[int, ...] | list[int] = (4, 4),
    mixers: tuple[str, ...] | list[Any] = ("mamba2",),
    direction: str = "alternate",
    head: str = "readout",
) -> Config:
    """Every pixel a token of the first stage, in Morton order; 2x2 blocks merge between stages. What ``image/cells256`` trains."""
    return {
        "modality": {"name": "image", "size": list(size), "channels": channels, "order": "morton"},
        "backbone": {
            "dim": list(dim),
            "depth": list(depth),
            "pool": list(pool),
            "mixers": list(mixers),
            "direction": direction,
        },
        "head": {"name": head, "num_classes": num_classes},
    }


@register_model("pixel_sequence")
def pixel_sequence(
    size: list[int] | tuple[int, int] = (28, 28),
    channels: int = 1,
    num_classes: int = 10,
    dim: int = 64,
    depth: int = 4,
    mixers: tuple[str, ...] | list[Any] = ("mamba2",),
    direction: str = "alternate",
    order: str = "raster",
) -> Config:
    """One width and one length throughout: the plain sequence model of pixels in raster order. What ``image/mnist784`` trains."""
    return {
        "modality": {"name": "image", "size": list(size), "channels": channels, "order": order},
        "backbone": {"dim": dim, "depth": depth, "mixers": list(mixers), "direction": direction},
        "head": {"name": "classify", "num_classes": num_classes},
    }


def save_model(model: Model, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder`` (made if needed)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model that :func:`save_model` wrote.

    Raises:
        FileNotFoundError: no ``config.json`` or ``model.safetensors`` there.
        ValueError: the files do not belong together, or are damaged.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing")
    try:
        model = Model(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"the saved model in {folder} is damaged: {error}") from error
    except RuntimeError as error:
        raise ValueError(
            f"{folder}/model.safetensors is of another architecture than its config.json: {error}"
        ) from error
    return model.to(device)
