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
from mmlong.mixers.gated_recurrence import RGLRU, MinGRU, MinLSTM
from mmlong.mixers.hyena import Hyena
from mmlong.mixers.local import Local
from mmlong.mixers.lru import LRU, S5
from mmlong.mixers.mamba2 import Mamba2
from mmlong.mixers.masked_conv import MaskedConv2d
from mmlong.mixers.rwkv7 import RWKV7
from mmlong.mixers.s4d import S4D
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

__all__ = [
    "KDA",
    "LRU",
    "MIXERS",
    "RGLRU",
    "RWKV7",
    "S4D",
    "S5",
    "Attention",
    "DeltaNet",
    "GatedDeltaNet",
    "Hyena",
    "Local",
    "Mamba2",
    "MaskedConv2d",
    "MinGRU",
    "MinLSTM",
    "Mixer",
    "State",
    "Traits",
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
