"""Models: modality + backbone + head; by name, from a configuration, from a folder."""

from __future__ import annotations

from mmlong.models.autoregressive import AutoregressiveModel
from mmlong.models.card import model_card
from mmlong.models.hub import load, push_to_hub, save_pretrained
from mmlong.models.joint import JointModel, Speaking
from mmlong.models.joint_masked import JointMaskedModel
from mmlong.models.lora import LoraConfig, add_lora, merge_lora, remove_lora
from mmlong.models.masked import MaskedModel
from mmlong.models.model import KINDS, Config, Model, build_model, register_kind
from mmlong.models.named import MODELS, create_model, list_models, register_model
from mmlong.models.saving import load_model, save_model
from mmlong.models.spans import Spans, lay_spans
from mmlong.models.spans_model import SpansModel
from mmlong.models.towers import TowersModel

__all__ = [
    "KINDS",
    "MODELS",
    "AutoregressiveModel",
    "Config",
    "JointMaskedModel",
    "JointModel",
    "LoraConfig",
    "MaskedModel",
    "Model",
    "Spans",
    "SpansModel",
    "Speaking",
    "TowersModel",
    "add_lora",
    "build_model",
    "create_model",
    "lay_spans",
    "list_models",
    "load",
    "load_model",
    "merge_lora",
    "model_card",
    "push_to_hub",
    "register_kind",
    "register_model",
    "remove_lora",
    "save_model",
    "save_pretrained",
]
