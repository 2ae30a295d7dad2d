"""Token mixers: the projections, gates and norms of a published mechanism around one op of :mod:`mmlong.ops`.

Importing this package registers the house's own families; other packages' come by the entry-point group ``mmlong.mixers``.
"""

from __future__ import annotations

from mmlong.mixers.attention import Attention
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
from mmlong.mixers.gated import GLA, HGRN2
from mmlong.mixers.gated_recurrence import RGLRU, MinGRU, MinLSTM
from mmlong.mixers.h3 import H3
from mmlong.mixers.hgrn import HGRN
from mmlong.mixers.hydra import Hydra
from mmlong.mixers.hyena import Hyena
from mmlong.mixers.kernelised import Based, LinearTransformer, Performer
from mmlong.mixers.local import Local
from mmlong.mixers.log_linear import LogLinear
from mmlong.mixers.long_conv import LongConv
from mmlong.mixers.lru import LRU, S5
from mmlong.mixers.mamba import Mamba
from mmlong.mixers.mamba2 import Mamba2
from mmlong.mixers.mamba3 import Mamba3
from mmlong.mixers.masked_conv import MaskedConv2d
from mmlong.mixers.mega import Mega
from mmlong.mixers.mlstm import MLSTM
from mmlong.mixers.retention import Lightning, RetNet
from mmlong.mixers.rfa import RFA
from mmlong.mixers.rnn import GRU, LSTM
from mmlong.mixers.rwkv4 import RWKV4, AFTSimple
from mmlong.mixers.rwkv6 import RWKV6
from mmlong.mixers.rwkv7 import RWKV7
from mmlong.mixers.s4 import S4
from mmlong.mixers.s4d import S4D
from mmlong.mixers.s4nd import S4ND
from mmlong.mixers.sgconv import SGConv
from mmlong.mixers.slots import ABC, GSA
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
from mmlong.mixers.tcn import TCN
from mmlong.mixers.titans import Titans
from mmlong.mixers.ttt import TTTMLP, TTTLinear
from mmlong.mixers.vmamba import VMamba

__all__ = [
    "ABC",
    "GLA",
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
    "Attention",
    "Based",
    "DeltaNet",
    "GatedDeltaNet",
    "Hydra",
    "Hyena",
    "Lightning",
    "LinearTransformer",
    "Local",
    "LogLinear",
    "LongConv",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MaskedConv2d",
    "Mega",
    "MinGRU",
    "MinLSTM",
    "Mixer",
    "Performer",
    "RetNet",
    "SGConv",
    "State",
    "StripedHyena2",
    "TTTLinear",
    "Titans",
    "Traits",
    "VMamba",
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
