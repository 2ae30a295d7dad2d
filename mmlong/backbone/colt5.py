"""A conditional feed-forward: a light branch for every token, and a heavy one for those that a router picks.

Follows CoLT5 (Ainslie et al. 2023, arXiv 2303.09752), its feed-forward. With a score ``s_t = u . x_t`` and, of each document of ``n`` tokens, the set ``T`` of the ``k = ceil(share n)`` with the highest,

    y_t = light(x_t) + p_t heavy(x_t)   for t in T;         y_t = light(x_t)    else

``p`` is the soft top-k of the scores (:func:`mmlong.ops.top_share.soft_top_share`): each at most 1, ``k`` in all, so that the router learns also of tokens that were not picked.

It is an encoder's: whether a token is picked depends on later ones, so a causal backbone refuses it.

Departures: the soft top-k is found exactly, where the paper stops its iteration after some rounds; branches are the house's SwiGLU; a share of the document's tokens takes the place of a number of tokens a row, so padding and packing change nothing. The paper's conditional attention (light local attention for all, heavy attention among picked
queries and keys) is not here: any two-sided mixer may stand beside this feed-forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.backbone.feedforward import FFNS, SwiGLU
from mmlong.layout import Layout
from mmlong.ops.top_share import check_share, count_top_share, soft_top_share, top_share


@FFNS.register("colt5")
class CoLT5(nn.Module):
    """A light and a heavy branch.

    Args:
        dim: width D.
        ratio: hidden width of a usual feed-forward over D.
        share: of a document's tokens for which the heavy branch is run.
        light, heavy: hidden widths of the branches, over the usual one.

    Raises:
        ValueError: a share outside (0, 1], or widths that are not above 0.
    """

    def __init__(self, dim: int, ratio: float, share: float = 1 / 16, light: float = 0.5, heavy: float = 4.0) -> None:
        super().__init__()
        check_share(share, "the heavy branch of colt5")
        if not (light > 0 and heavy > 0):
            raise ValueError(f"colt5: widths of branches are above 0, got light {light} and heavy {heavy}")
        self.share = float(share)
        self.router = nn.Linear(dim, 1, bias=False)
        self.light, self.heavy = SwiGLU(dim, ratio * light), SwiGLU(dim, ratio * heavy)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """``(B, L, D)`` to ``(B, L, D)``."""
        B, L, D = x.shape
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            s = nn.functional.linear(x.to(dtype), self.router.weight.to(dtype))[..., 0]
        picked = top_share(s, self.share, layout)
        # How many are picked does not depend on the scores, so nothing here waits for them.
        count = count_top_share(self.share, layout, B, L, x.device)
        places = picked.flatten().to(torch.int8).argsort(descending=True, stable=True)[:count]
        weights = soft_top_share(s, self.share, layout).flatten()[places]
        found = self.heavy(x.reshape(-1, D)[places])
        light = self.light(x)
        added = (found * weights[:, None].to(found.dtype)).to(light.dtype)
        return light.reshape(-1, D).index_add(0, places, added).view(B, L, D)
