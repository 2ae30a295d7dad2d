"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv 2002.05709), and the accuracy of nearest neighbours by which embeddings are judged.

Of ``2N`` vectors, two views of each of N things, ``z_i`` and ``z_j`` of one thing must be closer than ``z_i`` and all others:

    loss_i = -log( exp(z_i . z_j / t) / sum over k != i of exp(z_i . z_k / t) ),    z of length 1

and the loss is the mean over all ``2N``. With several ranks the others of all ranks are in the sum, and their gradients go home.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, rank 0's first; gradients come back to the rank they belong to, summed over those who used them. All ranks have as many."""
    if _ranks()[1] == 1:
        return x
    if not x.is_floating_point():
        parts = [torch.empty_like(x) for _ in range(_ranks()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


def nt_xent(first: Tensor, second: Tensor, temperature: float, counts: Tensor | None = None) -> Tensor:
    """The loss of this rank's rows.

    Args:
        first, second: ``(B, D)``, two views of each thing.
        temperature: t.
        counts: bool ``(B,)``, things that count; the others are neither asked for nor in any sum. ``None``: all.

    Returns:
        the mean over the ``2B`` views that count, in nats; 0 if none does.
    """
    batch = first.shape[0]
    # Similarities over a small temperature need more than half precision.
    z = F.normalize(torch.cat([first, second]).float(), dim=1)
    rows = torch.ones(2 * batch, dtype=torch.bool, device=z.device) if counts is None else counts.repeat(2)
    everyone, there = gather_rows(z), gather_rows(rows.to(torch.uint8)).bool()
    here = torch.arange(2 * batch, device=z.device)
    offset = _ranks()[0] * 2 * batch
    similarity = z @ everyone.T / temperature
    out = ~there[None] | (here[:, None] + offset == torch.arange(everyone.shape[0], device=z.device))
    similarity = similarity.masked_fill(out, float("-inf"))
    partner = (here + batch) % (2 * batch) + offset
    return F.cross_entropy(similarity[rows], partner[rows], reduction="sum") / rows.sum().clamp_min(1)


def neighbour_accuracy(embedding: Tensor, label: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """How often a thing's nearest neighbours among the others tell its label (weighted kNN, Wu et al. 2018, arXiv 1805.01978; each thing left out in turn).

    Args:
        embedding: ``(N, D)``.
        label: int64 ``(N,)``.
        k: neighbours that vote.
        temperature: a vote weighs ``exp(cosine / temperature)``.

    Returns:
        scalar from 0 to 1; NaN for fewer than two things.
    """
    count = embedding.shape[0]
    if count < 2:
        return torch.tensor(float("nan"), device=embedding.device)
    z = F.normalize(embedding.float(), dim=1)
    right = torch.zeros((), dtype=torch.int64, device=z.device)
    for start in range(0, count, 1024):
        part = slice(start, min(start + 1024, count))
        similarity = z[part] @ z.T
        own = torch.arange(part.start, part.stop, device=z.device)
        similarity[own - start, own] = float("-inf")
        near, who = similarity.topk(min(k, count - 1), dim=1)
        # Relative to the nearest, so that no weight overflows.
        weight = ((near - near[:, :1]) / temperature).exp()
        votes = torch.zeros(z[part].shape[0], int(label.max()) + 1, device=z.device).scatter_add_(1, label[who], weight)
        right += (votes.argmax(1) == label[part]).sum()
    return right / count
