"""What a descriptor of the service's stands for: the service itself, a VM or a vCPU."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from kvmsim.service.wire import Answer, Call

Handler = Callable[[Call, tuple[int, ...]], Awaitable[Answer]]


class Target:
    """What a descriptor stands for: it answers calls, one at a time for each descriptor."""

    handlers: dict[int, Handler]

    async def handle(self, call: Call, fds: tuple[int, ...]) -> tuple[Answer, tuple[int, ...], Target | None]:
        """Answer a call. Returns descriptors to go along, and what another one is to stand for. Raises OSError."""
        handler = self.handlers.get(call.number)
        if handler is None:
            raise OSError(errno.ENOTTY, f"ioctl {call.number:#x} is none that there is here")
        return await handler(call, fds), (), None

    def opened(self) -> None:
        """Take notice of one descriptor more."""

    def closed(self) -> None:
        """Take notice of one descriptor less."""

    def interrupt(self) -> None:
        """Have KVM_RUN return."""
