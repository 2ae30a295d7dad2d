"""mmlong's image models as timm's own: ``timm.create_model("mmlong_pixel_pyramid", num_classes=10, img_size=64)``.

Importing this module registers them with timm; mmlong itself does not, so that timm's registry is left alone. timm's training script sees them after, say::

    python -c "import mmlong.timm_models, runpy; runpy.run_path('train.py', run_name='__main__')" ... --model mmlong_pixel_pyramid

Images are real ``(B, C, H, W)``, normalised: with the mean and deviation 0.5 of their data configuration a pixel is in [-1, 1], exactly as mmlong's own modality has it. ``img_size`` is fixed when
a model is made. Options of :func:`mmlong.create_model` (``dim``, ``depth``, ``mixers``, ...) are taken as well. There are no pretrained weights. The model inside, ``model.model``, is mmlong's: ``model.model.save_pretrained(FOLDER)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mmlong.layout import Layout
from mmlong.modalities import ImageModality
from mmlong.models import MODELS, build_model
from mmlong.models.intermediates import forward_intermediates

POOLS = {"avg": "mean", "max": "max"}
"""timm's names of poolings, and what they are here."""


class PixelModel(nn.Module):
    """An image model of mmlong behind timm's interface.

    Args:
        config: of the model; see :class:`mmlong.models.Model`. Its modality is ``image``.

    Raises:
        ValueError: another modality.

    Attributes:
        model: mmlong's own.
        num_features: width of the features.
        head_hidden_size: numbers that the classifier sees.
        feature_info: width and stride of what each part of the backbone gives.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = build_model(config)
        modality = self.model.modality
        if not isinstance(modality, ImageModality):
            raise ValueError(f"timm's models take real images; modality {config['modality']['name']!r} has others")
        self.modality: ImageModality = modality
        self.num_classes = int(self.model.config["head"]["num_classes"])
        self.in_chans, (height, width) = modality.channels, modality.size
        self.num_features = self.model.num_features
        self.layout = Layout(grid=modality.size, order=modality.order)
        # Of shapes only: what the head would be given.
        tokens = self.model.backbone.length_out(height * width)
        with torch.no_grad():
            features = torch.zeros(1, tokens or 1, self.num_features)
            self.head_hidden_size = int(self.model.head.pooled(features, None).shape[-1])
        self.feature_info = self._feature_info()

    def _feature_info(self) -> list[dict[str, Any]]:
        backbone, layout, length, info = self.model.backbone, self.layout, self.modality.pixels, []
        for s, stage in enumerate(backbone.stages):
            if s:
                merge: Any = backbone.merges[s - 1]
                layout, length = merge.layout_out(layout, length), -(-length // merge.k)
            reduction = self.modality.size[0] // layout.grid[0] if layout.grid is not None else 1
            for i, block in enumerate(stage.children()):
                norm: Any = block.norm1
                width = norm.weight.shape[0]
                info.append({"num_chs": width, "reduction": reduction, "module": f"model.backbone.stages.{s}.{i}"})
        return info

    def tokens(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to tokens ``(B, H * W, C)`` in scan order.

        Raises:
            TypeError: integers.
            ValueError: another shape.
        """
        if not x.is_floating_point():
            raise TypeError(f"a timm model takes normalised real images, got {x.dtype}: (x / 255 - mean) / std")
        if x.ndim != 4 or tuple(x.shape[1:]) != self.modality.image:
            wanted = ", ".join(str(n) for n in self.modality.image)
            raise ValueError(f"this model reads images (B, {wanted}), got {tuple(x.shape)}: set img_size and in_chans")
        return x.flatten(2)[:, :, self.modality.order_index].transpose(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to ``(B, L', num_features)`` after the final norm."""
        features, _ = self.model.forward_features(self.tokens(x), None, self.layout)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits ``(B, num_classes)``, or with ``pre_logits`` to what the classifier sees."""
        return self.model.forward_head(x, None, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        """What parts of the backbone give, tensors in ``NCHW`` or ``NLC``; see :func:`mmlong.models.intermediates.forward_intermediates`."""
        features, found = forward_intermediates(
            self.model, self.tokens(x), self.layout, indices, norm, stop_early, getattr(output_fmt, "value", output_fmt)
        )
        found = [getattr(one, "x", one) for one in found]
        return found if intermediates_only else (features, found)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; ``num_classes=0``: none. ``global_pool``: ``avg`` or ``max``, of a head that pools."""
        options = {} if global_pool is None else {"pool": _pool(self.model.config, global_pool)}
        self.model.reset_classifier(num_classes, **options)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions from stem to head."""

        def below(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return r"^model\." + pattern.removeprefix("^")
            return [(below(each), order) for each, order in pattern]

        return {name: below(pattern) for name, pattern in self.model.group_matcher(coarse).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward instead of keeping their activations."""
        self.model.set_grad_checkpointing(enable)


def _pool(config: dict[str, Any], named: str) -> str:
    if config["head"]["name"] != "classify":
        raise ValueError(
            f"head {config['head']['name']} reads every position and pools none: leave global_pool, or set head='classify'"
        )
    if named not in POOLS:
        raise ValueError(f"global_pool is {named!r}; it can be {' or '.join(POOLS)}")
    return POOLS[named]


def _make(
    name: str, img_size: int | Sequence[int], in_chans: int, num_classes: int, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    global_pool: str | None = None, **options: Any,
) -> PixelModel:  # fmt: skip
    size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    config = MODELS.create(name, size=size, channels=in_chans, num_classes=num_classes, **options)
    config["backbone"]["drop_path"] = drop_path_rate
    config["head"]["dropout"] = drop_rate
    if global_pool is not None:
        config["head"]["pool"] = _pool(config, global_pool)
    return PixelModel(config)


def _create(variant: str, depths: Sequence[int], pretrained: bool, options: dict[str, Any]) -> Any:
    """The model, or with ``features_only`` what the last block of each stage gives."""
    ends = tuple(total - 1 for total in itertools.accumulate(depths))
    return build_model_with_cfg(
        lambda **given: _make(variant.removeprefix("mmlong_"), **given), variant, pretrained,
        feature_cfg={"out_indices": ends, "feature_cls": "getter"}, **options,
    )  # fmt: skip


def _cfg(size: int) -> dict[str, Any]:
    return {
        "num_classes": 1000, "input_size": (3, size, size), "fixed_input_size": True, "crop_pct": 1.0, "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "first_conv": None, "classifier": "model.head.linear", "license": "apache-2.0",
    }  # fmt: skip


default_cfgs = generate_default_cfgs({"mmlong_pixel_pyramid": _cfg(256), "mmlong_pixel_sequence": _cfg(32)})


@register_model
def mmlong_pixel_pyramid(pretrained: bool = False, **options: Any) -> PixelModel:
    """Every pixel a token, 2x2 blocks merge between stages; see :func:`mmlong.models.named.pixel_pyramid`."""
    return _create("mmlong_pixel_pyramid", options.get("depth", (1, 1, 4)), pretrained, options)


@register_model
def mmlong_pixel_sequence(pretrained: bool = False, **options: Any) -> PixelModel:
    """One width and one length throughout; see :func:`mmlong.models.named.pixel_sequence`."""
    return _create("mmlong_pixel_sequence", (options.get("depth", 4),), pretrained, options)
