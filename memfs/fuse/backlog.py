"""Requests that were read and wait for their users' turns.

The kernel queues requests in the order in which they come, so a user with many threads would be answered as often as it
has threads before another one is answered once. So when there is more to do than is done in one event-loop iteration,
the channel reads ahead (intake.py), and answers one request of each user, then a second. The requests of one user stay
in order.

How much a user can have here is bounded in bytes; and in number by its threads, each of which is in a system call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

from memfs.fuse.abi import Request

MOST_BYTES: Final = 4 << 20  #: of requests of one user


@dataclass(slots=True)
class _Queue:
    """The requests of one user."""

    requests: deque[Request] = field(default_factory=deque)
    nbytes: int = 0


class Backlog:
    """Requests by user. `user_of` says whose a request is."""

    def __init__(self, user_of: Callable[[Request], Hashable]) -> None:
        self._user_of: Final = user_of
        self.queues: Final[dict[Hashable, _Queue]] = {}  #: whose turn is next comes first; none is empty
        self._requests: Final[dict[int, Request]] = {}  # by number

    def __bool__(self) -> bool:
        return bool(self.queues)

    def interrupt(self, number: int) -> bool:
        """Mark a request as interrupted: its handler may not wait. Returns whether it is here."""
        request = self._requests.get(number)
        if request is not None:
            request.is_interrupted = True
        return request is not None

    def add(self, request: Request) -> bool:
        """Keep a request for later. Returns whether there is space: a large one may have to be answered now."""
        user = self._user_of(request)
        queue = self.queues.get(user)
        nbytes = len(request.message)
        if nbytes + (queue.nbytes if queue is not None else 0) > MOST_BYTES:
            return False
        if queue is None:
            queue = self.queues[user] = _Queue()
        request.keep()
        queue.requests.append(request)
        queue.nbytes += nbytes
        self._requests[request.number] = request
        return True

    def pop(self) -> Request:
        """Return the next request of the user whose turn it is. There must be one."""
        user, queue = next(iter(self.queues.items()))
        request = queue.requests.popleft()
        queue.nbytes -= len(request.message)
        del self.queues[user]
        if queue.requests:
            self.queues[user] = queue  # behind the others
        del self._requests[request.number]
        return request
