"""Taking the name of a socket where it can be had: nobody listens there, or a memfs that is not mounted here any more.

A memfs goes on after umount(2) has returned: for a moment, until it has freed its files, and for as long as it is used
if it was unmounted lazily or another mount namespace keeps it. The next one on the same directory is to have the
same name for its socket. So a name is taken over from a memfs that nobody here can get to by a path: which one that
is, each mounted memfs says itself (user.memfs.socket). The connections of that one stay; only new owners do not find
it. A memfs that is mounted in another namespace than ours keeps its name, and so does what is not a memfs.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import socket
import stat
import threading
import time
from typing import Final

from memfs.contract.protocol.connection import Connection, RemoteProtocolError, Role
from memfs.contract.protocol.messages import SOCKET_XATTR, Hello, HelloReply
from memfs.contract.sys.mountinfo import MEMFS, mounter_of, mountpoints_of_type
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.contract.sys.unix_address import address_of
from memfs.owners.liveness import is_dying

_TIMEOUT: Final = 5.0  # seconds for a listener to answer, or to end
_INTERVAL: Final = 0.02  # seconds between two looks at one that is ending
_MAX_REPLY: Final = 1024  # bytes


class _Listener(enum.Enum):
    NONE = enum.auto()
    ENDING = enum.auto()  # or too busy to say: it is asked again
    LEFT_BEHIND = enum.auto()  # a memfs that nobody can get to by a path here
    THERE = enum.auto()


def make_way(path: str) -> None:
    """Remove what lies at a path if it is the socket of nobody, or of a memfs that is not mounted here any more.

    Blocking. Raises OSError: EEXIST if it is not a socket, EADDRINUSE if somebody listens there.
    """
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise OSError(errno.EEXIST, "something that is not a socket lies there")
        found = _ask(path, status, deadline - time.monotonic())
        if found is _Listener.ENDING and time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        elif found in (_Listener.NONE, _Listener.LEFT_BEHIND):
            with contextlib.suppress(FileNotFoundError):  # that one has ended meanwhile
                if os.path.samestat(os.lstat(path), status):
                    os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, "another memfs listens there")


def _ask(path: str, status: os.stat_result, seconds: float) -> _Listener:
    """Return what listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe, address_of(path) as address:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return _Listener.NONE
        except BlockingIOError:  # its queue is full, so somebody listens
            return _Listener.ENDING
        pid, uid, _ = PeerCredentials.of(probe)
        if uid != os.geteuid():
            return _Listener.THERE
        if pid and is_dying(pid):
            return _Listener.NONE
        probe.settimeout(max(seconds, _INTERVAL))
        try:
            if not _is_memfs(probe):
                return _Listener.THERE
        except TimeoutError:
            return _Listener.THERE
        except ConnectionError:
            return _Listener.ENDING
        return _Listener.LEFT_BEHIND if _shares_our_mounts(pid) and not _is_mounted(status) else _Listener.THERE


def _is_memfs(probe: socket.socket) -> bool:
    """Return whether it is a memfs that answers. Raises ConnectionError if it disconnects, TimeoutError."""
    connection = Connection(Role.OWNER)
    probe.send(connection.send(Hello(name="memfs mount"))[1])
    data = probe.recv(_MAX_REPLY)
    if not data:
        raise ConnectionAbortedError
    try:
        message = connection.receive(data).message
    except RemoteProtocolError:
        return False
    if not isinstance(message, HelloReply):  # it says that it is ending
        raise ConnectionAbortedError
    return True


def _shares_our_mounts(pid: int) -> bool:
    """Return whether a process is known to be in our mount namespace."""
    try:
        return pid > 0 and os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt")
    except OSError:
        return False


def _is_mounted(status: os.stat_result) -> bool:
    """Return whether a memfs that listens on this socket is mounted where we see it.

    It is our user's, as the one that has just answered is; what another user's says is nothing to go by. The one in
    question has just answered, so it is not waited long for others that do not.
    """
    found = threading.Event()

    def ask(mountpoint: str) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(os.getxattr(mountpoint, SOCKET_XATTR)), status):
                found.set()

    ours = [mountpoint for mountpoint in mountpoints_of_type(MEMFS) if mounter_of(mountpoint) == os.geteuid()]
    asking = [threading.Thread(target=ask, args=[mountpoint], daemon=True) for mountpoint in ours]
    for thread in asking:
        thread.start()
    deadline = time.monotonic() + _TIMEOUT
    while not found.is_set() and any(thread.is_alive() for thread in asking) and time.monotonic() < deadline:
        found.wait(_INTERVAL)
    return found.is_set()
