"""Nurseries whose exceptions leave them as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_flat_nursery() -> AsyncIterator[trio.Nursery]:
    """Open a nursery out of which an exception comes as it is, and not in an ExceptionGroup.

    Of several the first one comes, and trio.Cancelled only if there is no other: for a nursery whose tasks serve one
    purpose, so that what ends one of them is what ends the whole.
    """
    failure: BaseException | None = None  # raised outside of the handler, or it would get the group as its context
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        failure = _first(group)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # a cycle with its traceback


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the exception that a group stands for."""
    leaves = list(_leaves(group))
    return next((error for error in leaves if not isinstance(error, trio.Cancelled)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Generate the exceptions of a group, and of the groups in it, in order."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error
