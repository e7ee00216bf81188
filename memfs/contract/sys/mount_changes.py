"""Changes of the mounts of our mount namespace: mounted, unmounted, moved, mounted again with other options."""

from __future__ import annotations

import select
from collections.abc import AsyncIterator

import trio


async def mount_changes() -> AsyncIterator[None]:
    """Generate an item after each change, or after several (proc_pid_mountinfo(5): POLLPRI)."""
    with open("/proc/self/mountinfo") as table, select.epoll() as changes:  # noqa: ASYNC230 - does not block
        # To read, it is always ready; in an epoll of its own only what is of interest counts.
        changes.register(table, select.EPOLLPRI | select.EPOLLET)
        while True:
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.poll(0)
            yield
