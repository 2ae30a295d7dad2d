"""A network of the package transformers in a backbone: ``{transformers: mamba, layers: 2, config: {state_size: 8}}``.

The architecture is built anew from its configuration, of the backbone's width, without embedding and pooler, and is given the tokens' vectors (``inputs_embeds``). Its own positions and final norm are as its authors have them; a grid is a line
to it.

What of the contract it honours. Padding and documents: each document of each row is run by itself (:mod:`mmlong.backbone.documents`). State: none. The caches
of transformers are no plain tensors and differ from one architecture to the next, so this part does not stream, not even one that sees the past only: generation, prefill in pieces and segmented training refuse a backbone with it, and a
backbone with it says that it is not causal. For those, use the mixer of that name here.

The package is an extra, ``mmlong[transformers]``, imported when such a part is made.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from mmlong.backbone.documents import each_document
from mmlong.backbone.part import register_part
from mmlong.layout import Layout
from mmlong.mixers import State
from mmlong.registry import nearest


@register_part("transformers")
class TransformersStack(nn.Module):
    """Layers of an architecture of transformers.

    Args:
        architecture: its name there (``model_type``), e.g. ``mamba``, ``llama``, ``bert``.
        dim: width D.
        layers: how many.
        config: other settings of its configuration, by their names there.

    Raises:
        ImportError: transformers is not installed.
        ValueError: an unknown architecture or setting, or an architecture that takes no sequence of vectors and gives one.
    """

    causal = False
    streaming = False

    def __init__(self, architecture: str, dim: int, layers: int = 1, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        try:
            from transformers import CONFIG_MAPPING, AutoModel
        except ImportError as error:
            raise ImportError(
                f"backbone.parts: {{transformers: {architecture}}} takes the package transformers: pip install 'mmlong[transformers]'"
            ) from error
        if layers < 1:
            raise ValueError(f"transformers: {architecture} needs at least 1 layer, got {layers}")
        if architecture not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers has no architecture {architecture!r}{nearest(architecture, CONFIG_MAPPING.keys())}"
            )
        kind: Any = CONFIG_MAPPING[architecture]
        given, usual = dict(config or {}), kind()
        known = {*usual.to_dict(), *usual.attribute_map}
        for key in given:
            if key not in known or key in ("hidden_size", "num_hidden_layers"):
                hint = nearest(key, known) if key not in known else ": the backbone's dim and the part's layers say it"
                raise ValueError(f"transformers: {architecture} has no setting {key!r} in config{hint}")
        made = kind(**given, hidden_size=dim, num_hidden_layers=layers)
        made.use_cache = False
        refused = f"transformers: {architecture} does not take a sequence of vectors and give one"
        if made.is_encoder_decoder:
            raise ValueError(f"{refused}: it is an encoder with a decoder")
        try:
            net: Any = AutoModel.from_config(made)
            net.set_input_embeddings(None)
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(refused) from error
        if "inputs_embeds" not in inspect.signature(net.forward).parameters:
            raise ValueError(refused)
        if getattr(net, "pooler", None) is not None:
            net.pooler = None
        self.architecture, self.dim, self.net = architecture, dim, net
        self.most: int | None = getattr(made, "max_position_embeddings", None)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and no state; at padding what came in.

        Raises:
            ValueError: a state, or a document longer than the architecture has positions.
        """
        if state is not None:
            raise ValueError(f"transformers: {self.architecture} was given a state but has none: it does not stream")
        return each_document(self._run, x, layout), None

    def _run(self, x: Tensor) -> Tensor:
        if self.most is not None and x.shape[1] > self.most:
            raise ValueError(
                f"transformers: {self.architecture} has {self.most:,} positions, and a document here {x.shape[1]:,} tokens: set config: {{max_position_embeddings: {x.shape[1]}}}"
            )
        y: Tensor = self.net(inputs_embeds=x).last_hidden_state
        return y
