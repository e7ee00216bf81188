"""The socket that owners connect to, which only those can reach that the mount options admit.

It is bound with mode 0600 and only then given its group and mode, so there is no moment at which it is wider than asked
for. What lies there already is replaced or stays as socket_name.py says; and so does, in the end, a socket that is
another's by then. The directory it lies in must not be one where somebody else could put another socket in its place.

A socket that was handed over (systemd.socket(5)) is its manager's: it has the mode and the group that it has, and stays
when we end, so that owners who connect meanwhile wait for whoever is started next.

In a user namespace everybody whom it does not know has the same uid, so that / does not seem to be root's. Directories
of those are taken for the system's: the default paths lie in no other, and whoever names another path knows whose it
is.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from memfs.contract.sys.unix_address import address_of
from memfs.contract.sys.user_namespace import uid_outside
from memfs.owners.socket_name import make_way

log = logging.getLogger(__name__)

_BACKLOG: Final = 128


class ListenError(Exception):
    """The socket cannot be created; the message is a sentence."""


class Listener:
    """A socket that owners connect to. `close` removes it; the next one to ask for its name has it immediately."""

    def __init__(self, path: str, sock: socket.socket, *, handed_over: bool = False) -> None:
        self.path: Final = path
        self.socket: Final = sock  #: non-blocking
        self._status: Final = os.lstat(path)
        self.mode: Final = stat.S_IMODE(self._status.st_mode)
        self.group: Final = self._status.st_gid
        self.handed_over: Final = handed_over  #: whether it is a service manager's

    @classmethod
    def of_descriptor(cls, path: str, fd: int, *, handed_over: bool = False) -> Listener:
        """Return the one that another process has had at a path. Raises OSError(ENOENT) if its name is gone."""
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        return cls(path, sock, handed_over=handed_over)

    def renew(self) -> None:
        """Have those that connect find this process behind it, and not the one that began to listen (SO_PEERCRED)."""
        self.socket.listen(_BACKLOG)

    def close(self) -> None:
        """Stop listening. What lies at the path stays if it is another's by then."""
        if self.socket.fileno() < 0:
            return
        self.socket.close()
        if not self.handed_over:
            self.remove()

    def remove(self) -> None:
        """Remove the name, unless it is another's by then."""
        try:
            if os.path.samestat(os.lstat(self.path), self._status):
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s stays: %s", self.path, error.strerror)


def listen(paths: Sequence[str], mode: int, group: int | None) -> Listener:
    """Listen on a socket of this mode and group (None: ours), at the first of these paths that can be had.

    The listener's path is the one that was found to be safe, without symbolic links: no other may be given to anybody.
    Blocking. Raises ListenError.
    """
    for path in paths:
        try:
            real = os.path.join(_checked_directory(os.path.dirname(path)), os.path.basename(path))
            make_way(real)
            return Listener(real, _bind(real, mode, group))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or path == paths[-1]:
                raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from error
    raise AssertionError("a socket has a path")


def listen_on(fd: int) -> Listener:
    """Listen on a socket that was handed over. Raises ListenError."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(f"descriptor {fd} was handed over, and is no socket: {error.strerror}") from error
    address = sock.getsockname()
    if (
        (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        or not os.path.isabs(address)
    ):
        raise ListenError(
            f"the socket that was handed over as descriptor {fd} is none for owners; in the unit, say "
            "ListenSequentialPacket= with an absolute path"
        )
    try:
        real = os.path.join(_checked_directory(os.path.dirname(address)), os.path.basename(address))
        if not stat.S_ISSOCK(os.lstat(real).st_mode):
            raise OSError(errno.EEXIST, "something that is not a socket lies there")
    except OSError as error:
        raise ListenError(f"cannot listen on {address}, which was handed over: {error.strerror}") from error
    sock.setblocking(False)
    return Listener(real, sock, handed_over=True)


def _bind(path: str, mode: int, group: int | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        with address_of(path) as address:
            sock.bind(address)
        os.chown(path, -1, os.getegid() if group is None else group)
        os.chmod(path, mode)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


def prepare_directory(directory: str) -> None:
    """Make a directory if it is missing: that of sockets and logs whose names nobody has said.

    Raises OSError(EPERM) if somebody else could replace what lies there, or it itself.
    """
    path = Path(os.path.realpath(directory))
    _check_directories(path)
    os.makedirs(path, mode=0o755, exist_ok=True)
    _check_directories(path)  # somebody else may have been first


def _checked_directory(directory: str) -> str:
    """Return the path of a directory without symbolic links.

    Raises OSError: ENOENT if there is none; EPERM if somebody else could replace what lies there, or it itself.
    """
    path = Path(os.path.realpath(directory))
    _check_directories(path)
    if not path.is_dir():
        raise OSError(errno.ENOENT, f"there is no directory {path}; create it")
    return str(path)


def _check_directories(path: Path) -> None:
    for each in (path, *path.parents):
        try:
            status = each.lstat()
        except FileNotFoundError:
            continue
        if status.st_uid not in (0, os.geteuid()) and uid_outside(status.st_uid) is not None:
            raise OSError(errno.EPERM, f"{each} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            raise OSError(errno.EPERM, f"others may replace files in {each}")
