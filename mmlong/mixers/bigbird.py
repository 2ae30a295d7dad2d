"""BigBird: blocks that see their neighbours, a few random blocks, and two global blocks.

Follows Zaheer et al. 2020 (arXiv 2007.14062), the form in which existing tokens are global (ITC), in blocks as its appendix and its code have it. Of 8 blocks, with ``window`` 3 and ``random`` 1, who sees whom (g global, w window,
r random)::

    g g g g g g g g
    w w w . . r . g
    g w w w . . r g
    g . w w w . r g
    g r . w w w . g
    g . . r w w w g
    g . r . . w w w
    g g g g g g g g

The first block and the last see all blocks and are seen by all; every other sees ``window`` blocks around its own and ``random`` more, other ones for each head. A document of at most two blocks is global. The last block may be
short. Random blocks are drawn among those that a block does not see already, and there are fewer where those are.

Random blocks are a function of ``seed``, the head and the number of blocks, and so are the same whenever a length comes again; nothing is drawn while the mixer runs. The paper draws once a layer: give each its own ``seed``.

Departures: positions are rotary (``rope=False``: none); a document's short last block is a global one of its own, where the authors' code fills it up. There is no causal form: the last block looks back from the end, and a global
block looks ahead.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmlong.layout import Layout
from mmlong.mixers.contract import register_mixer
from mmlong.mixers.document import Parts
from mmlong.mixers.document_attention import DocumentAttention
from mmlong.ops.block_attention import Blocks, block_attention


@register_mixer(
    "bigbird",
    paper="Zaheer et al. 2020, arXiv 2007.14062",
    causal=False,
    bidirectional=True,
    streaming=False,
    state="none",
    cost="n",
    note="ITC, with RoPE (rope=False: none); proved against transformers' BigBirdBlockSparseAttention, weights copied and the same random blocks",
    survey=(("Big Bird", ""),),
)
class BigBird(DocumentAttention):
    """Window, random and global blocks.

    Args:
        dim: width D.
        causal: must be ``False``.
        block: tokens of a block.
        window: blocks seen around a block's own, itself included; odd.
        random: random blocks that each sees beside.
        seed: of the random blocks.
        heads, head_dim, rope, rope_base, bias: as :class:`~mmlong.mixers.document_attention.DocumentAttention`.

    Raises:
        ValueError: sizes that do not fit, or a causal one.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        block: int = 64,
        window: int = 3,
        random: int = 3,
        seed: int = 0,
        heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal, heads=heads, head_dim=head_dim, rope=rope, rope_base=rope_base, bias=bias)
        if block < 1:
            raise ValueError(f"BigBird: block must be at least 1, got {block}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"BigBird: window must be an odd number of blocks, got {window}")
        if random < 0 or seed < 0:
            raise ValueError(f"BigBird: random and seed must be at least 0, got {random} and {seed}")
        self.block, self.window, self.random, self.seed = block, window, random, seed

    def state_bytes(self, length: int) -> int:
        return 0

    def mix_document(
        self, x: Tensor, state: Parts | None, past: int, layout: Layout | None
    ) -> tuple[Tensor, Parts | None]:
        T, b = x.shape[1], self.block
        q, k, v = self.project(x)
        n = -(-T // b)
        if n <= 2:
            return self.leave(F.scaled_dot_product_attention(q, k, v)), None
        edge = (n - 1) * b
        first, last = (F.scaled_dot_product_attention(t, k, v) for t in (q[:, :, :b], q[:, :, edge:]))
        lists = listed_blocks(self.heads, n, self.window, self.random, self.seed)
        # Only a last block that is short, which stands first, and lists with gaps have anything to hide.
        masked = np.where((lists < 0).any((0, 2)), lists.shape[2], int(T % b > 0))
        blocks = Blocks(torch.from_numpy(lists)[None].to(x.device), b, b, masked=masked)
        middle, _ = block_attention(q[:, :, b:edge], k, v, blocks)
        y = torch.cat([t.transpose(1, 2) for t in (first, middle, last)], 1)
        return self.leave(y.transpose(1, 2)), None


@lru_cache(maxsize=64)
def listed_blocks(heads: int, n: int, window: int, random: int, seed: int) -> np.ndarray:
    """int64 ``(heads, n - 2, m)``: the blocks that all but the first and the last of ``n`` see, each once, the last one first; -1 for none."""
    own = np.arange(1, n - 1)
    around = own[:, None] + np.arange(window) - window // 2
    # The first block and the last are listed as global.
    around = np.where((around > 0) & (around < n - 1), around, -1)
    fixed = np.concatenate([np.broadcast_to([n - 1, 0], (n - 2, 2)), around], 1)
    fixed = np.broadcast_to(fixed, (heads, *fixed.shape))
    return np.concatenate([fixed, random_blocks(heads, n, window, random, seed)], 2)


def random_blocks(heads: int, n: int, window: int, random: int, seed: int) -> np.ndarray:
    """int64 ``(heads, n - 2, random)``: blocks neither global nor in the window, for each block but the first and the last of ``n``; -1 where there are no more.

    Floyd's choice of ``random`` among ``m``, for all blocks together: of ``t = m - random, ..., m - 1`` in turn, a number up to ``t``, or ``t`` itself if that was taken before.
    """
    own = np.arange(1, n - 1)
    low, high = np.maximum(own - window // 2, 1), np.minimum(own + window // 2, n - 2)
    others = n - 2 - (high - low + 1)
    rng = np.random.default_rng((seed, n))
    chosen = np.full((heads, n - 2, random), -1, np.int64)
    for s in range(random):
        t = others - random + s
        draw = np.floor(rng.random((heads, n - 2)) * (t + 1)).astype(np.int64)
        taken = (chosen[..., :s] == draw[..., None]).any(-1)
        chosen[..., s] = np.where(t < 0, -1, np.where(taken, t, draw))
    # The number of a block among those that may be drawn, as its number among all.
    block = 1 + chosen
    block = np.where(block >= low[:, None], block + (high - low + 1)[:, None], block)
    return np.where(chosen < 0, -1, block)
