"""What the kernel does not say of who makes a request: supplementary groups."""

from __future__ import annotations

import pyfuse3

from memfs.fuse.abi import Request


def in_group_or_capable(request: Request, gid: int) -> bool:
    """Whether the caller belongs to a group, or may act as if (CAP_FSETID, which root is taken to have)."""
    if request.uid == 0 or request.gid == gid:
        return True
    try:
        return gid in pyfuse3.get_sup_groups(request.pid)
    except (OSError, RuntimeError):  # the process is gone already
        return False
