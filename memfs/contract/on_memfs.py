"""Paths that lead to a memfs, when others may have had a hand in them.

The owner of a directory decides what its names lead to: a link to a file of somebody else's, a FIFO that blocks those
that open it, a file of another filesystem with an attribute that names a socket of the owner's. A program of root's
that changes what it finds there, and sends a descriptor of it to that socket, would give away any file. So:

- A path is followed by hand, and of symbolic links only those that root made, or the user that the program runs as; in
  the place of a file, not even these. Links of a filesystem that another user serves (FUSE) are all taken for that
  user's.
- What is found is held by an O_PATH descriptor, which opens nothing, so neither blocks nor starts anything (a device).
- It must lie on a mount of type fuse.memfs in our mount namespace, by the id of the mount that the descriptor was
  opened through. All that is asked, changed and opened from then on is that inode, by its descriptor.
- A descriptor is sent only to a process of root's, of our own user or of the user that mounted that memfs, who has its
  files anyway, as the kernel recorded when it began to listen (SO_PEERCRED).

Rejected: openat2(2) with RESOLVE_NO_SYMLINKS, which refuses /var/run and each home directory that was moved; statfs(2)
for the type of the filesystem, which asks that filesystem, and which any FUSE filesystem answers alike.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from memfs.contract.sys.fdinfo import fdinfo
from memfs.contract.sys.mountinfo import MEMFS, type_and_options

_MAX_LINKS: Final = 40  # as the kernel's MAXSYMLINKS


class OnMemfs:
    """A file or directory on a memfs, held by an O_PATH descriptor: `fd`. Use `locate`.

    Methods raise OSError with the path that was asked for.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path: Final = path
        self.fd: Final = fd

    @property
    def mounter(self) -> int:
        """The uid of whoever mounted the memfs, and says what its attributes say."""
        return _mount(self.fd)[1]

    def get(self, attribute: str) -> str:
        """Return an extended attribute; bytes that are not UTF-8 as os.fsdecode has them."""
        with naming(self.path):
            return os.fsdecode(os.getxattr(self._name, attribute))

    def set(self, attribute: str, value: str) -> None:
        """Set an extended attribute."""
        with naming(self.path):
            os.setxattr(self._name, attribute, value.encode())

    def open(self, flags: int) -> int:
        """Open a regular file anew. EINVAL: it is something else, which might block or do something by being opened."""
        with naming(self.path):
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            return os.open(self._name, flags | os.O_CLOEXEC)

    def create(self, name: str) -> int:
        """Create a regular file of mode 0600, in the directory that this is, and return an O_PATH descriptor of it.

        EEXIST: the name exists.
        """
        with naming(os.path.join(self.path, name)):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
            try:
                return os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
            finally:
                os.close(fd)

    @property
    def _name(self) -> str:
        return f"/proc/self/fd/{self.fd}"


@contextmanager
def locate(path: str, *, last_link: bool = False) -> Iterator[OnMemfs]:
    """Find what a path leads to, which must lie on a memfs, and hold it within a with statement.

    `last_link`: the last name may be a link, too, as far as it is trusted. Blocking: not for the event loop. Raises
    OSError with the path: EOPNOTSUPP if it does not lie on a memfs, ELOOP for a link that is not followed.
    """
    with naming(path):
        fd = _walk(path, last_link)
    try:
        with naming(path):
            check(fd)
        yield OnMemfs(path, fd)
    finally:
        os.close(fd)


def check(fd: int) -> None:
    """Raise OSError(EOPNOTSUPP) unless a descriptor is of something on a memfs."""
    kind, _ = _mount(fd)
    if kind != MEMFS:
        raise OSError(errno.EOPNOTSUPP, "does not lie on a memfs")


def check_recipient(uid: int, fd: int) -> None:
    """Raise OSError(EPERM) unless a user may be sent a file's descriptor: root, ourselves, or who mounted its memfs."""
    if uid in _trusted():
        return
    kind, mounter = _mount(fd)
    if kind != MEMFS or uid != mounter:
        raise OSError(errno.EPERM, f"user {uid} listens on the socket: not root, not you, not who mounted the memfs")


def _walk(path: str, last_link: bool) -> int:
    """Return an O_PATH descriptor of what a path leads to."""
    if not path:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    with ExitStack() as opened:

        def keep(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        names, links = _names(path), 0
        here = keep(os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_CLOEXEC))
        while names:
            name = names.pop()
            found = keep(_step(here, name, is_last=not names))
            if not stat.S_ISLNK(os.fstat(found).st_mode):
                here = found
                continue
            target = _target(found, is_file=not names and not last_link)
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            names += _names(target)
            if target.startswith("/"):
                here = keep(os.open("/", os.O_PATH | os.O_CLOEXEC))
        return os.dup(here)


def _names(path: str) -> list[str]:
    """Return the names of a path, the first one last. What ends in a slash is a directory: its last name is a dot."""
    names = [name for name in path.split("/") if name]
    return [*(["."] if path.endswith("/") else []), *reversed(names)]


def _step(here: int, name: str, *, is_last: bool) -> int:
    """Open a name as it stands, with O_PATH. O_DIRECTORY on the way has autofs mount what ought to be there."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    if not is_last:
        with suppress(NotADirectoryError):  # a link, or what the next step fails on
            return os.open(name, flags | os.O_DIRECTORY, dir_fd=here)
    return os.open(name, flags, dir_fd=here)


def _target(link: int, *, is_file: bool) -> str:
    """Return what a symbolic link says. Raises OSError(ELOOP) if it is not to be followed."""
    if is_file:
        raise OSError(errno.ELOOP, "a symbolic link, which is not followed")
    _, mounter = _mount(link)
    if not {os.fstat(link).st_uid, mounter} <= _trusted():
        raise OSError(errno.ELOOP, "a symbolic link of another user leads there, which is not followed")
    return os.readlink("", dir_fd=link)


def _mount(fd: int) -> tuple[str, int]:
    """Return the type of the filesystem that a descriptor was opened through, and the uid of whoever mounted it.

    All but FUSE's are taken for root's. The type of a mount that is not in our namespace (any more) is empty.
    """
    kind, options = type_and_options(fdinfo(fd)["mnt_id"]) or ("", "")
    ids = (option.removeprefix("user_id=") for option in options.split(",") if option.startswith("user_id="))
    return kind, int(next(ids, 0)) if kind.startswith("fuse") else 0


def _trusted() -> set[int]:
    return {0, os.geteuid()}


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have an OSError say the path that it is about, and not a name by which that was reached, or none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
