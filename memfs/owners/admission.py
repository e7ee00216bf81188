"""Admission of clients to the socket, and limits on how much of the daemon each user may hold.

The kernel checks the socket's mode when a client connects. It is checked again here, against the credentials that the
kernel recorded at that moment (SO_PEERCRED, SO_PEERGROUPS): what counts is the mount options, whatever was done to the
socket's file since.

A connection costs memory and a descriptor, so there are limits: for all, for each user (other than root and the user
that the daemon runs as, who could stop it anyway), and for connections that have not said Hello. Of the latter the
oldest is disconnected when there are too many, so that clients that say nothing do not keep out those that do.
Requests that are not answered yet are limited for each user, too, for each connection may have as many as the protocol
allows. A connection that is rejected is closed immediately, or if that might wait, given to the closer: nothing of it
is left in the daemon.

Descriptors from strangers are received, looked at and closed by another process (closer.py). A connection's own socket
is closed here, but not in the event loop: closing it closes what lies in its queue, and a socket there may linger.
Threads do that, a few for each user, so that a user's descriptors hold up that user only. Until they are closed, here
and there, they count as the user's connections do: a client that sends descriptors which block in close(2) exhausts its
own connection quota, not the daemon's threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from memfs.contract.aio.threads import NoThread
from memfs.contract.aio.turns import Turns
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.store.shares import Pool

MAX_CONNECTIONS: Final = 4096  #: from which on only trusted users are admitted
MAX_PER_USER: Final = 1024  #: connections, and descriptors that are being closed
MAX_SILENT: Final = 128  #: connections that have not said Hello
MAX_REQUESTS: Final = 4096  #: of one user, that are being acted upon or wait, on all its connections
_THREADS: Final = 4  # for one user
_UNITS_TO_CLOSE: Final = 4  # of work, to have a thread close a descriptor (contract/aio/turns.py)
_UCRED_SIZE: Final = 12  # bytes of struct ucred
_RETRY: Final = 0.5  # seconds, after there was no thread available
_SO_PEERGROUPS: Final = 59
_MAX_GROUPS_BYTES: Final = 1024  # the most that Python's getsockopt takes


_T = TypeVar("_T")

#: Closes a descriptor, and returns when it is closed
Close = Callable[[int], Awaitable[None]]


class Rejected(Exception):
    """A client may not connect; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The process that connected, as the kernel recorded it then."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, sock: socket.socket) -> Credentials:
        """Return those of the process at the other end (unix(7)). Raises OSError."""
        pid, uid, gid = PeerCredentials.of(sock)
        groups = {gid}
        with contextlib.suppress(OSError):  # ERANGE: in more groups than that; its first one counts
            packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS_BYTES)
            groups.update(group for (group,) in struct.iter_unpack("=I", packed))
        return cls(pid, uid, frozenset(groups))

    def __str__(self) -> str:
        return f"process {self.pid} of user {self.uid}"


@dataclass(slots=True, eq=False)
class _User:
    """A user, and what it holds of the daemon."""

    connections: int = 0
    closing: int = 0  # descriptors
    requests: int = 0  # that are being acted upon
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_THREADS))

    @property
    def held(self) -> int:
        return self.connections + self.closing

    async def run_in_thread(self, function: Callable[..., _T], *args: object) -> _T:
        try:
            return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True, limiter=self.threads)
        except RuntimeError as error:  # Python's for EAGAIN
            raise NoThread from error

    async def close(self, fd: int) -> None:
        while True:
            try:
                await self.run_in_thread(os.close, fd)
            except NoThread:
                await trio.sleep(_RETRY)
                continue
            except OSError:  # closed all the same (close(2))
                pass
            return


def _has_received(sock: socket.socket) -> bool:
    """Shut a socket down and return whether something lies in its queue, be it empty but for descriptors."""
    with contextlib.suppress(OSError):  # it has ended
        sock.shutdown(socket.SHUT_RDWR)
    try:
        # From now on each message says who sent it; the end, which is as empty, does not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        _, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(_UCRED_SIZE), socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # all that it had sent is gone
        return False
    return bool(ancillary)


class Client:
    """A connection that was admitted. `disconnect` ends it."""

    def __init__(self, clients: Clients, credentials: Credentials, user: _User, disconnect: Callable[[], None]) -> None:
        self.credentials: Final = credentials
        self.disconnect: Final = disconnect
        self._clients: Final = clients
        self._user: Final = user

    def greeted(self) -> None:
        """Note that it has said Hello."""
        self._clients.silent.pop(self, None)

    def disconnected(self) -> None:
        """Note that it has ended."""
        self.greeted()
        self._user.connections -= 1
        self._clients.disconnected(self.credentials.uid)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request that is being acted upon. Raises OSError(ENOBUFS) if its user has too many."""
        if self._user.requests >= MAX_REQUESTS and not self._clients.trusts(self.credentials):
            raise OSError(errno.ENOBUFS, f"{MAX_REQUESTS} requests of this user are not answered yet")
        self._user.requests += 1
        try:
            yield
        finally:
            self._user.requests -= 1

    @property
    def is_clogged(self) -> bool:
        """Whether so many descriptors of its user are being closed that it must not send more."""
        return self._user.closing >= MAX_PER_USER and not self._clients.trusts(self.credentials)

    def discard(self, fds: Iterable[int], close: Close | None = None) -> list[trio.Event]:
        """Close descriptors that it sent, in threads unless `close` says how. Returns events that say when.

        An event may never come.
        """
        done = []
        for fd in fds:
            self._user.closing += 1
            done.append(trio.Event())
            trio.lowlevel.spawn_system_task(self._close, fd, close or self._user.close, done[-1])
        return done

    async def close(self, fds: Iterable[int], close: Close | None = None) -> None:
        """Close descriptors that it sent, and wait for that. If cancelled, they will be closed all the same."""
        for done in self.discard(fds, close):
            await done.wait()

    async def _close(self, fd: int, close: Close, done: trio.Event) -> None:
        await Turns.here().take(self.credentials.uid, _UNITS_TO_CLOSE)
        await close(fd)
        self._user.closing -= 1
        self._clients.forget(self.credentials.uid)
        done.set()


class Clients:
    """All clients that are connected. `mode` and `group` are the socket's; `group` None: the daemon's own.

    Of `descriptors` each connection takes one.
    """

    def __init__(self, mode: int, group: int | None, descriptors: Pool | None = None) -> None:
        self._descriptors: Final = descriptors or Pool("descriptors", MAX_CONNECTIONS * MAX_PER_USER)
        self._mode: Final = mode
        self._group: Final = os.getegid() if group is None else group
        self._trusted: Final = frozenset({0, os.geteuid()})
        self._users: Final[dict[int, _User]] = {}
        self.silent: Final[dict[Client, None]] = {}  #: have not said Hello, the oldest first
        self.rejected = 0  #: how many were not admitted, or disconnected before they said Hello
        self._all_rejected: Final = _User()  # all of them together

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return sum(user.connections for user in self._users.values())

    def admit(self, credentials: Credentials, disconnect: Callable[[], None]) -> Client:
        """Admit a client, or raise Rejected. `disconnect` is called if others need its place before it says Hello."""
        user = self._users.get(credentials.uid) or _User()
        why = self._why_not(credentials, user)
        if why is not None:
            self.rejected += 1
            raise Rejected(f"{credentials} is rejected: {why}")
        self._users[credentials.uid] = user
        self._descriptors.take(credentials.uid)
        user.connections += 1
        client = Client(self, credentials, user, disconnect)
        self.silent[client] = None
        if len(self.silent) > MAX_SILENT:
            oldest = next(iter(self.silent))
            oldest.greeted()
            self.rejected += 1
            oldest.disconnect()
        return client

    def trusts(self, credentials: Credentials) -> bool:
        """Return whether limits are not for a process: it could end the daemon anyway."""
        return credentials.uid in self._trusted

    def _why_not(self, credentials: Credentials, user: _User) -> str | None:
        if self.trusts(credentials):
            return None
        if self.connections >= MAX_CONNECTIONS:
            return f"there are {MAX_CONNECTIONS} connections"
        needed = 0o020 if self._group in credentials.groups else 0o002
        if not self._mode & needed:
            return f"socket_mode={self._mode:04o} does not admit it"
        if user.held >= MAX_PER_USER:
            return f"it has {user.held} connections"
        try:
            self._descriptors.check(credentials.uid)
        except OSError as error:
            return str(error.strerror)
        return None

    def reject(self, sock: socket.socket, close_elsewhere: Callable[[socket.socket], bool] = lambda _: False) -> None:
        """Close the connection of a client that was rejected.

        That waits for nobody, and nothing of it is left here. If it might wait, because what was sent lies in the queue
        and would be closed with it, `close_elsewhere` has another process do it, and returns whether there is one; else
        a thread does.
        """
        if not _has_received(sock):
            sock.close()
        elif not close_elsewhere(sock):
            trio.lowlevel.spawn_system_task(self._all_rejected.close, sock.detach())

    def disconnected(self, uid: int) -> None:
        """Note that a user has a connection less."""
        self._descriptors.give_back(uid)
        self.forget(uid)

    def forget(self, uid: int) -> None:
        """Forget a user that holds nothing any more."""
        user = self._users.get(uid)
        if user is not None and not user.held:
            del self._users[uid]
