r"""What two keepers say to each other when one takes the place of the other: `memfs upgrade`.

    the new one                                   the old one
    has loaded its code, connects      -->
                                       <--        the descriptors, how to tell whoever wants to hear of us
    checks that it can go on: READY    -->
                                                  kills its worker, waits for that
                                       <--        GO
    forks a worker, which takes over;
    right before its first request: UP -->
                                                  exits, and leaves all as it is

Until UP nobody has been answered by the new one, and what it has written is as before; so until then the old one goes
on if the connection ends. It ends when nobody has the new one's end any more, neither the new keeper nor the worker: so
never do two serve. The worker dies with the new keeper, and that is killed if it takes too long.

Both must have the same user id, which for a mount that survives is root's. Where the old one listens, its mount says;
and whoever may mount filesystems for all can have one say anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memfs.contract.sys.libc import prctl
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.contract.sys.unix_address import address_of

log = logging.getLogger(__name__)

FORMAT: Final = 1  #: of these messages
_READY: Final = b"ready"
_UP: Final = b"up"
_LONGEST: Final = 30.0  # seconds for the new one to take over, in which nobody is answered
_TIMEOUT: Final = 10.0  # seconds for the old one to answer what takes it no time
_MOST_BYTES: Final = 1 << 16
_MOST_FDS: Final = 64
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class UpgradeError(Exception):
    """Why there is no upgrade: a sentence. Nothing has changed."""


class Successor:
    """A keeper that wants to take our place. Its methods may block, for a moment only but for `replace`."""

    def __init__(self, connection: socket.socket, said: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Tell it what there is. Raises OSError: EPERM if it is another user's."""
        self._connection: Final = connection
        connection.settimeout(_TIMEOUT)
        self.pid, uid, _ = PeerCredentials.of(connection)
        if uid != os.geteuid():
            raise PermissionError
        socket.send_fds(connection, [json.dumps({"format": FORMAT, **said}).encode()], fds)
        self._process: Final = os.pidfd_open(self.pid)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when it is ready or gone."""
        return self._connection.fileno()

    def is_ready(self) -> bool:
        """Return whether it is ready to take over; if not, it is gone. Call when there is something to be read."""
        return self._receive() == _READY

    def replace(self, died: float) -> bool:
        """Have it take over, and return whether it does. If not, nobody of it is left.

        `died` is when the last worker has ended, by the monotonic clock.
        """
        try:
            self._connection.send(json.dumps({"died": died}).encode())
        except OSError:
            return False
        if self._is_readable(_LONGEST):
            return self._receive() == _UP
        self._connection.shutdown(socket.SHUT_RD)  # from now on it cannot say so
        if self._receive() == _UP:
            return True
        log.error("the new memfs has not taken over in %g s, and is killed", _LONGEST)
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        gone = select.poll()
        gone.register(self._connection, 0)
        gone.poll()
        return False

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(_MOST_BYTES)
        except OSError:
            return b""

    def _is_readable(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def close(self) -> None:
        """Have no more to do with it. If it has not taken over, it will not."""
        self._connection.close()
        os.close(self._process)


class Predecessor:
    """The keeper whose place we want to take. Raises UpgradeError."""

    def __init__(self, path: str) -> None:
        """Connect to where the keeper listens, and hear what there is. The descriptors are ours then."""
        self._connection: Final = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._connection.settimeout(_TIMEOUT)
        try:
            with address_of(path) as address:
                self._connection.connect(address)
            if PeerCredentials.of(self._connection).uid != os.geteuid():
                raise UpgradeError(f"another user listens on {path}")
            message, fds, _, _ = socket.recv_fds(self._connection, _MOST_BYTES, _MOST_FDS)
        except OSError as error:
            why = "does not answer (is it stopped, or busy with another upgrade?)"
            raise UpgradeError(f"the keeper {why if isinstance(error, TimeoutError) else error.strerror}") from error
        for fd in fds:
            os.set_inheritable(fd, False)
        if not message:
            raise UpgradeError("the keeper refuses: an upgrade is for root")
        self.said: Final[dict[str, Any]] = json.loads(message)
        if self.said.get("format") != FORMAT:
            raise UpgradeError(f"the keeper hands over in format {self.said.get('format')}; this memfs knows {FORMAT}")
        *self.mount, listener, self.output, self.error = fds
        self.listener: Final = (str(self.said["listener"]), listener)  #: where it listens: path and descriptor

    def end(self) -> float:
        """Have it end its worker, and return when it had, by the monotonic clock."""
        try:
            self._connection.send(_READY)
            self._connection.settimeout(None)  # the worker may have a thread in a long system call
            answer = self._connection.recv(_MOST_BYTES)
        except OSError:
            answer = b""
        if not answer:
            raise UpgradeError("the mount has ended, or its keeper")
        died: float = json.loads(answer)["died"]
        return died

    def die_with(self, parent: int) -> None:
        """Have this process, the worker, die with the new keeper as long as the old one may go on."""
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    def replaced(self) -> None:
        """Tell it that we take its place now. If that cannot be, this process ends."""
        try:
            self._connection.send(_UP)
        except OSError:
            log.critical("the old memfs goes on")
            os._exit(1)
        prctl(_PR_SET_PDEATHSIG, 0)
        self.close()

    def close(self) -> None:
        """Let the connection go."""
        self._connection.close()
