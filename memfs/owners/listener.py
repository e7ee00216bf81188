"""The socket that owners connect to: made so that nobody gets to it whom the mount options do not let in.

It is bound with mode 0600 and only then given its group and mode, so there is no moment at which it is wider than asked
for. A socket that nobody listens on is what a killed daemon left, and is replaced; anything else that lies there stays,
and so does, in the end, a socket that is another's by then. The directory it lies in must not be one where somebody
else could put another socket in its place.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_BACKLOG: Final = 128


class ListenError(Exception):
    """The socket cannot be had: a sentence."""


@contextlib.contextmanager
def listening(path: str, mode: int, group: int | None) -> Iterator[socket.socket]:
    """Listen on a non-blocking socket of this mode and group (None: ours); removed in the end. Raises ListenError."""
    try:
        listener = _listen(path, mode, group)
    except OSError as error:
        raise ListenError(f"cannot listen on {path}: {error.strerror or error}") from error
    ours = os.lstat(path)
    try:
        yield listener
    finally:
        listener.close()
        try:
            if os.path.samestat(os.lstat(path), ours):
                os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s stays: %s", path, error.strerror)


def _listen(path: str, mode: int, group: int | None) -> socket.socket:
    prepare_directory(os.path.dirname(path))
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
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
    """Make it if it is missing. Raises OSError(EPERM) if somebody else could replace what lies there, or it itself."""
    os.makedirs(directory, mode=0o755, exist_ok=True)
    path = Path(os.path.realpath(directory))
    for each in (path, *path.parents):
        status = each.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, f"{each} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            raise OSError(errno.EPERM, f"others may replace files in {each}")


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "something that is not a socket lies there")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)  # EAGAIN: its queue is full, so somebody listens
        with contextlib.suppress(BlockingIOError):
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
    raise OSError(errno.EADDRINUSE, "another memfs listens there")
