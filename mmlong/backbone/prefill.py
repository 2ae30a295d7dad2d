"""Reading a prompt: of what stands last in a backbone only the state is wanted.

Every part but the last must give its outputs, for the parts behind it. What the last one gives is asked for at the prompt's end alone, where the next token is; so within ``with states_only():`` a backbone calls the last part's ``absorb`` in place of its ``forward``, if it has one, and what comes
out is not a number, so that nobody takes it for features. Attention then projects keys and values and does not attend; a memory of all keys does not search. States are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ASKED: ContextVar[bool] = ContextVar("states_only", default=False)


@contextmanager
def states_only() -> Iterator[None]:
    """States are wanted of the backbones that are called within, and no outputs."""
    before = _ASKED.set(True)
    try:
        yield
    finally:
        _ASKED.reset(before)


def asked() -> bool:
    """Whether it is so now."""
    return _ASKED.get()
