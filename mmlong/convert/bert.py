"""Models of BERT's form with sparse attention: Longformer (Beltagy et al. 2020, arXiv 2004.05150) and BigBird (Zaheer et al. 2020, arXiv 2007.14062).

Norms stand behind the branches and before the first block, places and one segment type are learned vectors, and the head is a layer, a norm and the table of codes. Models with their masked-language head are read; what the
first token is made into for classification (``pooler``) is kept beside. Segment types but the first are given back as they came: tokens here have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from mmlong.convert.contract import Converter, ConvertError, Published, register_converter
from mmlong.convert.table import Row
from mmlong.models import Config

KINDS = ("weight", "bias")


class BertForm(Converter):
    """What both share; subclasses say what the mixers are."""

    kinds = ("plain",)
    gelu: ClassVar[str] = "gelu"
    head_rows: ClassVar[Mapping[str, str]] = {}
    """Their layer, norm, bias and decoder of the head, by ``dense``, ``norm``, ``bias`` and ``decoder``."""

    def model(self, p: Published, mixers: list[dict[str, Any]], first_place: int, scale: float) -> Config:
        """The configuration of ours, of one mixer a layer."""
        p.must("tie_word_embeddings", True, "the head is the table of codes")
        dim, eps = p["hidden_size"], p.get("layer_norm_eps", 1e-12)
        gelu = p.activation("hidden_act", self.gelu)
        return {
            "kind": "plain",
            "modality": {
                "name": "tokens",
                "codes": p["vocab_size"],
                "places": p["max_position_embeddings"],
                "first_place": first_place,
                "scale": scale,
                "types": p.get("type_vocab_size", 2),
            },
            "backbone": {
                "dim": dim,
                "depth": p["num_hidden_layers"],
                "mixers": mixers,
                "direction": "both",
                "ffn": {"name": "mlp", "activation": gelu},
                "ffn_ratio": p["intermediate_size"] / dim,
                "norm_eps": eps,
                "norm_after": True,
                "norm_in": True,
                "norm_out": False,
            },
            "head": {
                "name": "categorical",
                "num_classes": p["vocab_size"],
                "tied": True,
                "transform": gelu,
                "norm_eps": eps,
            },
        }

    def rows(self, p: Published) -> Iterable[Row]:
        at = f"{self.prefix}embeddings"
        yield Row(f"{at}.word_embeddings.weight", "modality.code.weight")
        yield Row(f"{at}.position_embeddings.weight", "modality.place.weight")
        if p.get("type_vocab_size", 2):
            yield Row(f"{at}.token_type_embeddings.weight", "modality.type_table.weight")
        for kind in KINDS:
            yield Row(f"{at}.LayerNorm.{kind}", f"backbone.norm_in.{kind}")
            yield Row(f"{self.head_rows['dense']}.{kind}", f"head.dense.{kind}")
            yield Row(f"{self.head_rows['norm']}.{kind}", f"head.norm.{kind}")
        yield Row(self.head_rows["bias"], "head.linear.bias")
        for i in range(p["num_hidden_layers"]):
            theirs, ours = f"{self.prefix}encoder.layer.{i}", f"backbone.stages.0.{i}"
            for kind in KINDS:
                for name in ("query", "key", "value"):
                    yield Row(f"{theirs}.attention.self.{name}.{kind}", f"{ours}.mixer.{name[0]}_proj.{kind}")
                yield Row(f"{theirs}.attention.output.dense.{kind}", f"{ours}.mixer.out_proj.{kind}")
                yield Row(f"{theirs}.attention.output.LayerNorm.{kind}", f"{ours}.norm1.{kind}")
                yield Row(f"{theirs}.intermediate.dense.{kind}", f"{ours}.ffn.0.{kind}")
                yield Row(f"{theirs}.output.dense.{kind}", f"{ours}.ffn.2.{kind}")
                yield Row(f"{theirs}.output.LayerNorm.{kind}", f"{ours}.norm2.{kind}")
            yield from self.more_rows(p, f"{theirs}.attention.self", f"{ours}.mixer")

    def more_rows(self, p: Published, theirs: str, ours: str) -> Iterator[Row]:
        """Of one attention, beside those that both have."""
        yield from ()

    def same(self, p: Published) -> Mapping[str, str]:
        decoder = self.head_rows["decoder"]
        table = f"{self.prefix}embeddings.word_embeddings.weight"
        return {f"{decoder}.weight": table, f"{decoder}.bias": self.head_rows["bias"]}


@register_converter("longformer")
class Longformer(BertForm):
    """``LongformerForMaskedLM``; option ``globals``: how many first tokens are global, which there is said at every call."""

    reads = "Longformer"
    note = "exact for globals (default 0) first tokens that see all and are seen by all, said there at every call; padding by lengths"
    prefix = "longformer."
    options = ("globals",)
    unused: ClassVar[Mapping[str, str]] = {
        "*_global.*": "global attention of a model without global tokens; and the bias of global keys, which adds the same to all scores of a query",
        "*pooler.*": "what the first token is made into for classification",
        "*position_ids": "numbers from 0 on, which older files hold",
    }
    head_rows: ClassVar[Mapping[str, str]] = {
        "dense": "lm_head.dense",
        "norm": "lm_head.layer_norm",
        "bias": "lm_head.bias",
        "decoder": "lm_head.decoder",
    }

    def config(self, p: Published, kind: str) -> Config:
        depth = p["num_hidden_layers"]
        windows = p.get("attention_window", 512)
        windows = [windows] * depth if isinstance(windows, int) else windows
        if len(windows) != depth or any(window < 2 or window % 2 for window in windows):
            raise ConvertError(
                f"config.json: attention_window is {windows}, and is even, one for each of {depth} layers"
            )
        # Theirs counts both sides.
        mixers = [
            {
                "name": "longformer",
                "window": window // 2,
                "globals": p.options.get("globals", 0),
                "heads": p["num_attention_heads"],
                "rope": False,
                "bias": True,
            }
            for window in windows
        ]
        return self.model(p, mixers, p.get("pad_token_id", 1) + 1, 1.0)

    def more_rows(self, p: Published, theirs: str, ours: str) -> Iterator[Row]:
        if not p.options.get("globals", 0):
            return
        for name, kinds in (("query", KINDS), ("key", KINDS[:1]), ("value", KINDS)):
            for kind in kinds:
                yield Row(f"{theirs}.{name}_global.{kind}", f"{ours}.{name[0]}_global.{kind}")


@register_converter("big_bird")
class BigBird(BertForm):
    """``BigBirdForMaskedLM``, of both of its ``attention_type``."""

    reads = "BigBird"
    note = (
        "original_full: exact. block_sparse: exact for the same random blocks and whole blocks; transformers draws none at inference (it reads block 0 once more for each, "
        "so its outputs are others), and takes dense attention up to 5 + 2 num_random_blocks blocks"
    )
    prefix = "bert."
    gelu = "gelu_new"
    unused: ClassVar[Mapping[str, str]] = {
        "*pooler.*": "what the first token is made into for classification",
        "cls.seq_relationship.*": "the head that says whether one text follows another",
        "*position_ids": "numbers from 0 on, which older files hold",
        "*embeddings.token_type_ids": "zeros, which older files hold",
    }
    head_rows: ClassVar[Mapping[str, str]] = {
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
        "decoder": "cls.predictions.decoder",
    }

    def config(self, p: Published, kind: str) -> Config:
        p.must("is_decoder", False, "attention is two-sided")
        p.must("add_cross_attention", False, "there is no other sequence to attend to")
        p.must("use_bias", True, "all projections have biases, or none")
        attention = p.get("attention_type", "block_sparse")
        if attention not in ("block_sparse", "original_full"):
            raise ConvertError(
                f"config.json: attention_type is {attention!r}; known are block_sparse and original_full"
            )
        heads: dict[str, Any] = {"heads": p["num_attention_heads"], "bias": True}
        full = {"name": "attention", "positions": "none", **heads}
        sparse = {
            "name": "bigbird",
            "block": p.get("block_size", 64),
            "random": p.get("num_random_blocks", 3),
            "rope": False,
        }
        depth, sparsely = p["num_hidden_layers"], attention == "block_sparse"
        mixers = [{**sparse, "seed": i, **heads} if sparsely else full for i in range(depth)]
        scale = p["hidden_size"] ** 0.5 if p.get("rescale_embeddings", False) else 1.0
        return self.model(p, mixers, 0, scale)
