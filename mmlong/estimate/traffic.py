"""Bytes that one rank sends in a training step, by how the work is shared out.

Formulas of the usual ring algorithms (Thakur et al. 2005; ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054), with R ranks and P bytes of parameters or gradients:

- ``ddp``: every rank has the model and rows of its own; gradients are all-reduced, ``2 P (R - 1) / R``.
- ``fsdp``: parameters, gradients and optimiser are in R parts; parameters are gathered in the forward and again in the backward, gradients are reduce-scattered, ``3 P (R - 1) / R``.
- ``sequence_parallel`` (:mod:`mmlong.parallel`): every rank has the model and a piece of each row. It hands on one state a row, hands back one state's gradient, and gradients are
  all-reduced. A rank waits for the state before it, so of M groups of rows each rank idles for ``(R - 1) / (R - 1 + M)`` of the time.
"""

from __future__ import annotations

from typing import Literal, get_args

Strategy = Literal["ddp", "fsdp", "sequence_parallel"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


def all_reduce(size: int, ranks: int) -> int:
    """Bytes that each of some ranks sends to sum ``size`` bytes over all."""
    return round(2 * size * (ranks - 1) / ranks)


def share_out(size: int, ranks: int) -> int:
    """Bytes that each rank sends in an all-gather to, or a reduce-scatter of, ``size`` bytes."""
    return round(size * (ranks - 1) / ranks)


def traffic(
    strategy: Strategy, ranks: int, parameters: int, gradients: int, states: int = 0, accumulate: int = 1
) -> dict[str, int]:
    """Bytes that the busiest rank sends in an optimiser step, by what they are.

    Args:
        strategy: how the work is shared out.
        ranks: R.
        parameters: bytes of all parameters.
        gradients: bytes of those of trained ones.
        states: bytes of the states that the busiest rank hands on, of all rows.
        accumulate: batches to an optimiser step.
    """
    if ranks == 1:
        return {}
    if strategy == "fsdp":
        # Lightning reduces the gradients of every batch that is accumulated, and each needs the parameters.
        return {
            "parameters, gathered twice": 2 * accumulate * share_out(parameters, ranks),
            "gradients, reduced": accumulate * share_out(gradients, ranks),
        }
    sent = {"gradients, reduced": all_reduce(gradients, ranks)}
    if strategy == "sequence_parallel":
        sent = {"states, forward": states * accumulate, "their gradients, back": states * accumulate, **sent}
    return sent


def bubble(strategy: Strategy, ranks: int, rows: int) -> float:
    """The share of its time for which a rank waits for others, with ``rows`` groups of rows on their way at once."""
    return (ranks - 1) / (ranks - 1 + rows) if strategy == "sequence_parallel" else 0.0
