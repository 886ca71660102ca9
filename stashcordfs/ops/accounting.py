"""Whose requests are they? Whoever works within `charged` finds them counted in its account.

Tasks that are started inside inherit it (contextvars). Counting is all: nothing is refused here.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_account: ContextVar[Account | None] = ContextVar("account", default=None)


@dataclass(slots=True)
class Account:
    """How many requests to the API were made in its name."""

    requests: int = 0


@contextmanager
def charged(account: Account) -> Iterator[None]:
    """Requests inside are counted in the account."""
    token = _account.set(account)
    try:
        yield
    finally:
        _account.reset(token)


def count_request() -> None:
    """A request to the API is about to be sent."""
    account = _account.get()
    if account is not None:
        account.requests += 1
