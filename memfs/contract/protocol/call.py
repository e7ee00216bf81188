"""A message of ours on its way over a connection (peer.py), and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from memfs.contract.protocol.connection import RequestId
from memfs.contract.protocol.messages import Message


class PeerGone(Exception):
    """The connection has ended: the peer closed it, died, or broke the protocol."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message and the descriptors that came with it, which the receiver of this owns and must close.

    There are none, whatever was sent, if this process had no space for them (EMFILE).
    """

    id: RequestId
    message: Message
    fds: tuple[int, ...]


#: Gets a reply, and owns its descriptors
LateReply = Callable[[Incoming], object]


class Carrier(Protocol):
    """The part of a connection that a call needs (`Peer`)."""

    def receive_for(self, call: Call) -> None:
        """Receive replies until a call is done, or nothing is there, or a request is next."""

    def poll_for(self, call: Call) -> None:
        """Busy-poll for the reply to a call."""

    def abandon(self, call: Call) -> None:
        """Forget a call that nobody waits for any more."""


class Call:
    """A message of ours, on its way. A request is done when its `reply` is there, anything else when it is sent."""

    __slots__ = (
        "_event",
        "carrier",
        "fds",
        "is_answered",
        "is_cancelled",
        "is_done",
        "is_sent",
        "late",
        "message",
        "reply",
    )

    def __init__(
        self, carrier: Carrier, message: Message, fds: Sequence[int], late: LateReply | None, *, is_answered: bool
    ) -> None:
        self.carrier = carrier  #: the connection that it is on
        self._event: trio.Event | None = None  # None: nobody waits
        self.message: Final = message
        self.fds = fds  #: travel with it, and stay the caller's
        self.late: Final = late  #: gets a reply that comes when nobody waits for it any more
        self.is_answered: Final = is_answered  #: whether the protocol demands a reply
        self.is_sent = False
        self.is_done = False  #: also when the connection has ended
        self.is_cancelled = False  #: whether the reply is to be dropped when it comes
        self.reply: Incoming | None = None

    async def wait(self) -> None:
        """Wait until it is done. Raises PeerGone if the connection ended before.

        When cancelled, a reply that has come in time counts: a process that was stopped finds a deadline passed, and
        the reply not yet read. Otherwise the message stays sent, and its reply is dropped when it comes.
        """
        if not self.is_done:
            self._event = trio.Event()
            try:
                await self._event.wait()
            except trio.Cancelled:
                self.carrier.receive_for(self)
                if not self.is_done:
                    self.is_cancelled = True
                    self.carrier.abandon(self)
                    raise
        if not self.is_sent or (self.is_answered and self.reply is None):
            raise PeerGone("the connection ended before the answer")

    async def result(self) -> Incoming:
        """Wait for the reply and return it. Raises PeerGone."""
        await self.wait()
        assert self.reply is not None, f"{self.message} has no reply"
        return self.reply

    def poll(self) -> None:
        """Busy-poll for its reply; nothing else runs meanwhile. It is done if that came soon, before any request."""
        self.carrier.poll_for(self)

    def done(self) -> None:
        """Note that it is done, and wake the task that waits for it."""
        self.is_done = True
        if self._event is not None:
            self._event.set()
