"""What a sub-command raises when it cannot go on, and there is something useful to say in place of a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """A message for the person at the terminal: what is wrong, where, what to do.

    Args:
        message: said after ``mmlong COMMAND:``.
        status: exit status; 2 for a wrong command, 1 for something that failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status
