"""Token mixers: the projections, gates and norms of a published mechanism around one op of :mod:`mmlong.ops`.

Importing this package registers the house's own families; other packages' come by the entry-point group ``mmlong.mixers``.
"""

from __future__ import annotations

from mmlong.mixers.adaptive_span import AdaptiveSpan
from mmlong.mixers.attention import Attention
from mmlong.mixers.axial import Axial, AxialDecoder
from mmlong.mixers.bigbird import BigBird
from mmlong.mixers.block_recurrent import BlockRecurrent
from mmlong.mixers.clusterformer import ClusterFormer
from mmlong.mixers.contract import (
    MIXERS,
    Mixer,
    Traits,
    create_mixer,
    list_mixers,
    register_mixer,
    require_streaming,
)
from mmlong.mixers.delta import KDA, DeltaNet, GatedDeltaNet
from mmlong.mixers.differential import DiffAttention
from mmlong.mixers.dilated import Dilated
from mmlong.mixers.dsa import DSA
from mmlong.mixers.efficient_attention import EfficientAttention
from mmlong.mixers.etc import ETC
from mmlong.mixers.expire_span import ExpireSpan
from mmlong.mixers.fnet import FNet
from mmlong.mixers.forgetting import ForgettingAttention
from mmlong.mixers.gated import GLA, HGRN2
from mmlong.mixers.gated_recurrence import RGLRU, MinGRU, MinLSTM
from mmlong.mixers.gmlp import GMLP
from mmlong.mixers.grid_windows import Neighborhood2d, Neighborhood3d, Swin2d
from mmlong.mixers.h3 import H3
from mmlong.mixers.h_transformer import HTransformer
from mmlong.mixers.hardcoded_gaussian import HardcodedGaussian
from mmlong.mixers.hgrn import HGRN
from mmlong.mixers.hydra import Hydra
from mmlong.mixers.hyena import Hyena
from mmlong.mixers.image_local import ImageLocal1d, ImageLocal2d
from mmlong.mixers.infini import InfiniAttention
from mmlong.mixers.kernelised import Based, LinearTransformer, Performer
from mmlong.mixers.latent import LatentAttention
from mmlong.mixers.linformer import Linformer
from mmlong.mixers.local import Local
from mmlong.mixers.log_linear import LogLinear
from mmlong.mixers.long_conv import LongConv
from mmlong.mixers.long_short import LongShort
from mmlong.mixers.longformer import Longformer
from mmlong.mixers.lru import LRU, S5
from mmlong.mixers.luna import Luna
from mmlong.mixers.mamba import Mamba
from mmlong.mixers.mamba2 import Mamba2
from mmlong.mixers.mamba3 import Mamba3
from mmlong.mixers.masked_conv import MaskedConv2d, MaskedConv3d
from mmlong.mixers.mega import Mega
from mmlong.mixers.memorizing import Memorizing
from mmlong.mixers.memory_compressed import MemoryCompressed
from mmlong.mixers.mixer_mlp import MixerMLP
from mmlong.mixers.mlstm import MLSTM
from mmlong.mixers.moba import MoBA
from mmlong.mixers.nsa import NSA
from mmlong.mixers.nystromformer import Nystromformer
from mmlong.mixers.poolingformer import Poolingformer
from mmlong.mixers.reformer import Reformer
from mmlong.mixers.retention import Lightning, RetNet
from mmlong.mixers.rfa import RFA
from mmlong.mixers.rnn import GRU, LSTM
from mmlong.mixers.routing import Routing
from mmlong.mixers.rwkv4 import RWKV4, AFTSimple
from mmlong.mixers.rwkv4_channel import RWKV4Channel
from mmlong.mixers.rwkv6 import RWKV6
from mmlong.mixers.rwkv7 import RWKV7
from mmlong.mixers.s4 import S4
from mmlong.mixers.s4d import S4D
from mmlong.mixers.s4nd import S4ND
from mmlong.mixers.segment_memory import Compressive, TransformerXLMemory
from mmlong.mixers.set_transformer import SetTransformer
from mmlong.mixers.sgconv import SGConv
from mmlong.mixers.sinkhorn import Sinkhorn
from mmlong.mixers.slots import ABC, GSA
from mmlong.mixers.sparse import SparseFixed, SparseStrided
from mmlong.mixers.state import (
    State,
    detach_state,
    map_state,
    rebuild_state,
    select_rows,
    state_bytes,
    state_tensors,
    state_to,
)
from mmlong.mixers.striped_hyena import StripedHyena2
from mmlong.mixers.synthesizer import SynthesizerDense, SynthesizerRandom
from mmlong.mixers.tcn import TCN
from mmlong.mixers.titans import Titans
from mmlong.mixers.topk_attention import TopK
from mmlong.mixers.ttt import TTTMLP, TTTLinear
from mmlong.mixers.vmamba import VMamba
from mmlong.mixers.xcit import XCiT

__all__ = [
    "ABC",
    "DSA",
    "ETC",
    "GLA",
    "GMLP",
    "GRU",
    "GSA",
    "H3",
    "HGRN",
    "HGRN2",
    "KDA",
    "LRU",
    "LSTM",
    "MIXERS",
    "MLSTM",
    "NSA",
    "RFA",
    "RGLRU",
    "RWKV4",
    "RWKV6",
    "RWKV7",
    "S4",
    "S4D",
    "S4ND",
    "S5",
    "TCN",
    "TTTMLP",
    "AFTSimple",
    "AdaptiveSpan",
    "Attention",
    "Axial",
    "AxialDecoder",
    "Based",
    "BigBird",
    "BlockRecurrent",
    "ClusterFormer",
    "Compressive",
    "DeltaNet",
    "DiffAttention",
    "Dilated",
    "EfficientAttention",
    "ExpireSpan",
    "FNet",
    "ForgettingAttention",
    "GatedDeltaNet",
    "HTransformer",
    "HardcodedGaussian",
    "Hydra",
    "Hyena",
    "ImageLocal1d",
    "ImageLocal2d",
    "InfiniAttention",
    "LatentAttention",
    "Lightning",
    "LinearTransformer",
    "Linformer",
    "Local",
    "LogLinear",
    "LongConv",
    "LongShort",
    "Longformer",
    "Luna",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MaskedConv2d",
    "MaskedConv3d",
    "Mega",
    "Memorizing",
    "MemoryCompressed",
    "MinGRU",
    "MinLSTM",
    "Mixer",
    "MixerMLP",
    "MoBA",
    "Neighborhood2d",
    "Neighborhood3d",
    "Nystromformer",
    "Performer",
    "Poolingformer",
    "RWKV4Channel",
    "Reformer",
    "RetNet",
    "Routing",
    "SGConv",
    "SetTransformer",
    "Sinkhorn",
    "SparseFixed",
    "SparseStrided",
    "State",
    "StripedHyena2",
    "Swin2d",
    "SynthesizerDense",
    "SynthesizerRandom",
    "TTTLinear",
    "Titans",
    "TopK",
    "Traits",
    "TransformerXLMemory",
    "VMamba",
    "XCiT",
    "create_mixer",
    "detach_state",
    "list_mixers",
    "map_state",
    "rebuild_state",
    "register_mixer",
    "require_streaming",
    "select_rows",
    "state_bytes",
    "state_tensors",
    "state_to",
]
