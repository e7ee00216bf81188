"""Keeping this process's memory to itself: no core dump, and nobody else of its own user looks into it.

A process that is not dumpable (prctl(2): PR_SET_DUMPABLE) leaves no core, whatever core_pattern says, and the kernel
lets only who has CAP_SYS_PTRACE attach to it, read its memory (/proc/PID/mem, process_vm_readv(2)) or take its
descriptors (/proc/PID/fd, pidfd_getfd(2)). What the process does to itself through /proc/self goes on to work.
"""

from __future__ import annotations

import logging
import resource
from typing import Final

from memfs.contract.sys.libc import prctl

log = logging.getLogger(__name__)

_PR_SET_DUMPABLE: Final = 4  # linux/prctl.h


def hide_memory() -> None:
    """Leave no core from now on, and let no other process look into this one. Raises OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl(_PR_SET_DUMPABLE, 0)
    try:
        with open("/proc/self/fdinfo/0"):
            pass
    except FileNotFoundError:  # it is closed
        pass
    except PermissionError:  # before Linux 5.14, without root: then not even we may look
        prctl(_PR_SET_DUMPABLE, 1)
        log.warning("this kernel lets no process look at itself that others may not: our memory can be dumped")
