"""Entering another mount namespace, in order to run programs there with the rights that we have.

What runs then comes out of the files there: the interpreter, its modules, the libraries of both. So they must be those
that are here. That is so if the root directory is the same one, and if only who may mount here may mount there: whoever
has a user namespace of its own can lay anything over anything. Rejected: nsenter(1), which asks neither.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

from memfs.contract.sys.libc import setns

_CLONE_NEWNS: Final = 0x20000  # linux/sched.h
_NS_GET_USERNS: Final = 0xB701  # linux/nsfs.h


def enter_mount_namespace(path: str) -> None:
    """Enter a mount namespace, whose root is the working directory then. There must be one thread.

    Raises OSError, having changed nothing: EPERM if its programs may be others'.
    """
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _is_of_our_users(there):
            raise OSError(errno.EPERM, "belongs to another user namespace: mount from within it", path)
        root, directory = os.stat("/"), os.getcwd()
        setns(there, _CLONE_NEWNS)
        if not os.path.samestat(os.stat("/"), root):
            setns(before, _CLONE_NEWNS)
            os.chdir(directory)
            raise OSError(errno.EPERM, "has another root, so its programs are others': mount from within it", path)
    finally:
        os.close(there)
        os.close(before)


def _is_of_our_users(namespace: int) -> bool:
    owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    try:
        return os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user"))
    finally:
        os.close(owner)
