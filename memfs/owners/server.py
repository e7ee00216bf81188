"""The server: accepts connections on memfs's socket, and runs a session for each (session.py)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from typing import Final

import trio

from memfs.contract.aio.poller import Poller
from memfs.contract.logs import fields
from memfs.owners.admission import Clients, Credentials, Rejected
from memfs.owners.closer import Closer
from memfs.owners.owner import Owner
from memfs.owners.registry import Registry
from memfs.owners.session import Session
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_LIVENESS_INTERVAL: Final = 0.05  # seconds between two looks at the processes of owners that are being waited for
_NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server:
    """Listens on a non-blocking socket for the owners of one mount's files.

    `device` is the mount's device number as "major:minor".
    """

    def __init__(
        self, listener: socket.socket, clients: Clients, closer: Closer, registry: Registry, tree: Tree, device: str
    ) -> None:
        self._listener: Final = listener
        self._clients: Final = clients
        self._closer: Final = closer
        self._registry: Final = registry
        self._tree: Final = tree
        self._device: Final = device
        self._sessions: Final[dict[Owner, Session]] = {}
        self._scope: trio.CancelScope | None = None
        self._ended: Final = trio.Event()
        Poller.here()  # now, while there is a descriptor for it
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # so that there is always one to accept with

    async def run(self) -> None:
        """Serve until cancelled, or until `end`."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._end_the_dead)
                while True:
                    await self._accept(nursery)
        finally:
            if self._spare >= 0:
                os.close(self._spare)
            self._ended.set()

    async def end(self) -> None:
        """Admit nobody any more, send all owners the final message, and end them. Nothing waits for them then."""
        self._registry.coming_back.give_up()
        if self._scope is not None:
            async with trio.open_nursery() as nursery:
                for session in self._sessions.values():
                    nursery.start_soon(session.send_final, errno.ESHUTDOWN, "memfs has ended")
            self._scope.cancel()
            await self._ended.wait()

    async def _end_the_dead(self) -> None:
        """End sessions that are being waited for and whose processes cannot answer any more."""
        outstanding = self._registry.outstanding
        while True:
            await outstanding.wait()
            await trio.sleep(_LIVENESS_INTERVAL)
            for owner in outstanding.owners & self._sessions.keys():
                self._sessions[owner].end_if_dead()

    async def _accept(self, nursery: trio.Nursery) -> None:
        await trio.lowlevel.wait_readable(self._listener)
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _NO_RESOURCES:
                raise
            await self._reject(error)
        else:
            self._admit(sock, nursery)

    def _admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        client = None
        try:
            credentials = Credentials.of(sock)
            client = self._clients.admit(credentials, lambda: _disconnect(sock, credentials))
            session = Session(sock, client, self._closer, self._registry, self._tree, self._device)
        except (Rejected, OSError) as error:  # no memory, or no space in an epoll, is no reason to end everybody else
            if isinstance(error, Rejected):
                log.warning("%s", error)
            else:
                log.error("a connection is rejected: %s", error.strerror)  # noqa: TRY400
            if client is not None:
                client.disconnected()
            self._clients.reject(sock, self._closer.close_connection)
            return
        nursery.start_soon(self._run, session)

    async def _run(self, session: Session) -> None:
        self._sessions[session] = session
        log.info("connected", extra=fields(owner=session.number, pid=session.pid))
        try:
            await session.run()
        finally:
            log.info("disconnected", extra=fields(owner=session.number))
            del self._sessions[session]

    async def _reject(self, error: OSError) -> None:
        """End a connection for which no descriptor is left, rather than let it wait."""
        log.error("a connection is rejected: %s", error.strerror)
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            self._clients.reject(sock, self._closer.close_connection)
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            await trio.sleep(0.1)  # another thread took it; to accept immediately would spin


def _disconnect(sock: socket.socket, credentials: Credentials) -> None:
    """End a connection whose session then notices. It may have ended already."""
    log.warning("%s is disconnected: it did not say Hello, and others came", credentials)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
