"""Closing descriptors of somebody else's: that may wait for a filesystem that never answers, and then only they do."""

from __future__ import annotations

import os
from contextlib import suppress

import trio


async def close_in_thread(fds: tuple[int, ...]) -> None:
    """Close descriptors, in a thread, and return when that is done. A cancellation waits."""
    if fds:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_close_all, fds, limiter=trio.CapacityLimiter(1))


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
