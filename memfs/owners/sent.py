"""The descriptors that a client sends: they lie in the closer, and count as its user's until they are closed."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Final

from memfs.contract.protocol.custody import Custody, Datagram
from memfs.owners.admission import Client
from memfs.owners.closer import Closer


class Sent(Custody):
    """What one client has sent. Descriptors are numbers here that only the closer can do something with."""

    __slots__ = ("_client", "_closer", "_uid")

    def __init__(self, client: Client, closer: Closer) -> None:
        self._client: Final = client
        self._closer: Final = closer
        self._uid: Final = client.credentials.uid

    @property
    def user(self) -> int:
        """The user that the client runs as."""
        return self._uid

    def receive(self, sock: socket.socket, size: int, ancillary: int, flags: int) -> Datagram:
        """Receive a datagram; the descriptors that come with it go to the closer."""
        return self._closer.receive(self._uid, sock, size, flags)

    def discard(self, fds: Iterable[int]) -> None:
        """Have them closed."""
        self._client.discard(fds, self._close)

    def close(self, sock: socket.socket) -> None:
        """Close the client's connection."""
        self._client.discard((sock.detach(),))

    async def close_all(self, fds: Iterable[int]) -> None:
        """Close them; returns when they are closed, which may be never. If cancelled, they are closed all the same."""
        await self._client.close(fds, self._close)

    async def look(self, fd: int) -> dict[str, str]:
        """Return what /proc says of one (fdinfo); that may take as long as the client likes. Raises OSError."""
        return await self._closer.look(self._uid, fd)

    def fetch(self, fd: int) -> int:
        """Return a descriptor of our own of one that is of a memory file. Raises OSError(EINVAL) if it is not."""
        return self._closer.fetch(fd)

    async def _close(self, fd: int) -> None:
        await self._closer.close(self._uid, fd)
