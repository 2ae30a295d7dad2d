"""Towers: things of several modalities as vectors that can be compared, through one backbone (CLIP, Radford et al. 2021, arXiv 2103.00020).

    y = model(raw, lengths, name)      (B, K), a projection of the pooled features of each row

Each modality has a stem and a projection head of its own; CLIP's two encoders are one backbone here, which knows nothing of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmlong.backbone import Backbone
from mmlong.heads import create_head
from mmlong.layout import Layout
from mmlong.modalities import Modality, create_modality
from mmlong.models.model import Config, Model, register_kind
from mmlong.registry import nearest


class Tower(nn.Module):
    """Stem and head of one modality.

    Args:
        modality, head: ``{name: ..., option: ...}``.
        backbone: between the two; not kept.
    """

    def __init__(self, modality: dict[str, Any], head: dict[str, Any], backbone: Backbone) -> None:
        super().__init__()
        self.modality = create_modality(dim=backbone.dim_in, **modality)
        self.options = {"name": "project", **head}
        self.head = create_head(dim=backbone.num_features, **self.options)


@register_kind("towers")
class TowersModel(Model):
    """One backbone, a tower for each modality.

    Args:
        config: ``{"kind": "towers", "modalities": {name: {"name": ..., **options}}, "backbone": {...}}``, the backbone of any direction. May have ``heads`` (by name; ``project`` unless given).

    Attributes:
        towers: what belongs to each modality, by name.

    Raises:
        ValueError: a backbone that reads codes, a name that no modality has, or a head that predicts tokens.
    """

    parts = ("modalities", "backbone")
    own_parts = ("heads",)

    def __init__(self, config: Config) -> None:
        super().__init__({**config, "kind": "towers"})

    def make(self, config: Config) -> None:
        """The towers."""
        if self.backbone.reads_codes or self.backbone.config.reverse_complement:
            raise ValueError("the backbone reads the codes or strands of one modality, and towers are of several")
        self.reads_codes = False
        names, heads = list(config["modalities"]), config.get("heads") or {}
        for name in heads:
            if name not in names:
                raise ValueError(
                    f"heads has {name!r}{nearest(name, names)}; the modalities are {', '.join(names) or 'none'}"
                )
        self.towers: Any = nn.ModuleDict(
            {name: Tower(given, heads.get(name) or {}, self.backbone) for name, given in config["modalities"].items()}
        )
        towers: Any = self.towers
        if per_token := [name for name, tower in towers.items() if tower.head.per_token]:
            raise ValueError(f"a tower makes one vector of a row; the head of {per_token[0]} predicts tokens")
        config["heads"] = {name: tower.options for name, tower in self.towers.items()}

    @property
    def modality(self) -> Modality:  # type: ignore[override]
        """Each tower has one."""
        raise ValueError(
            f"this is for models of one modality, and these towers have {', '.join(self.towers)}: model.towers[name].modality"
        )

    def tokens_per_sample(self) -> int | None:
        """Tokens of every pair, where all have as many; else ``None``."""
        each = [tower.modality.tokens_per_sample() for tower in self.towers.values()]
        return None if None in each else sum(each)

    def forward(  # type: ignore[override]
        self, raw: Tensor, lengths: Tensor | None, name: str, pre_logits: bool = False
    ) -> Tensor:
        """Raw tensors of one modality to projections ``(B, K)``; with ``pre_logits`` to the embeddings that they are made of."""
        tower = self.towers[name]
        tokens, layout = tower.modality.encode(raw, lengths, None)
        x, _ = self.backbone(tower.modality.embed(tokens, layout), None, layout)
        out: Layout | None = self.backbone.layout_out(layout, tokens.shape[1])
        return tower.head.pooled(x, out) if pre_logits else tower.head(x, out)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the plain model's; the stems are those of the towers."""
        return {**super().group_matcher(coarse), "stem": r"^towers\.[^.]+\.modality\b"}
