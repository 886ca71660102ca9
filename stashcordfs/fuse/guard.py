"""The guard around every handler: whatever goes wrong becomes an errno.

pyfuse3 ends the whole mount on any exception but FUSEError (its loop awaits handlers unguarded),
so this is one of the two places that catch everything; the other supervises background tasks.
"""

from __future__ import annotations

import errno
import functools
import logging
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3

from stashcordfs.errors import FsError, LocalDiskError, StashcordError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

F = TypeVar("F", bound="Callable[..., Awaitable[Any]]")


def guard(handler: F) -> F:
    """Wrap a method of `StashcordOperations`."""
    name = handler.__name__

    @functools.wraps(handler)
    async def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        try:
            return await handler(self, *args, **kwargs)
        except FsError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        except pyfuse3.FUSEError:
            raise
        except LocalDiskError as error:
            self.report(f"{name}: {error}")
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except StashcordError as error:
            self.report(f"{name}: {error}")
            raise pyfuse3.FUSEError(errno.EIO) from None
        except Exception as error:
            log.exception("handler failed name=%s", name)
            self.fault(name, error)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            self.timed(name, perf_counter() - started)

    return guarded  # type: ignore[return-value]
