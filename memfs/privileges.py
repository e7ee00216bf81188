"""The daemon gives up what it does not need, once it has mounted and opened what takes root.

With root two capabilities are left, in every set and for good (the bounding set is cut as well, and no_new_privs keeps
setuid programs from giving anything back):

    CAP_SYS_ADMIN         backing files for passthrough, the size of the detached tmpfs (fspick), umount(2)
    CAP_DAC_READ_SEARCH   umount(2) of a mountpoint in a directory that is closed to root, such as a user's home

Without root there are none to begin with. no_new_privs is not set then: fusermount3, which will have to unmount, is
setuid.

The kernel's OOM killer does not take it (as root): with it all guests would go, for the sake of memory that somebody
else has taken, since the daemon's own is little and that of files has a limit.

Nothing dumps the daemon's memory: the core limit is 0, and it is not dumpable (prctl(2)), which also keeps other
processes of its own user from reading it, /proc/PID/fd included. Private pages are not in that memory anyway, since the
daemon never maps or reads them; so there is nothing to be excluded page by page with MADV_DONTDUMP.

Capabilities are a thread's own: this must be called while there is one thread.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Final

from memfs.contract.sys.dumpable import hide_memory
from memfs.contract.sys.libc import capget, capset, prctl

CAP_DAC_READ_SEARCH: Final = 2
CAP_SYS_ADMIN: Final = 21
KEPT: Final = frozenset({CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN})

_USER_NS_INIT_INO: Final = 0xEFFFFFFD  # linux/nsfs.h
_OOM_SCORE_ADJ_MIN: Final = "-1000"  # linux/oom.h

# linux/prctl.h
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
# linux/capability.h: version 3, two words of 32 capabilities; each effective, permitted, inheritable
_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_SETS: Final = struct.Struct("=6I")


def drop(*, setuid_helper: bool, keep: frozenset[int] = KEPT) -> None:
    """Keep these capabilities, as far as we have them, and nothing else. `setuid_helper`: we shall run one.

    Raises OSError if the kernel refuses what it must not refuse to anybody.
    """
    with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OOM_SCORE_ADJ_MIN)
    _drop_capabilities(keep)
    if not setuid_helper:
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
    hide_memory()


def is_root_of_the_host() -> bool:
    """Return whether we are root in the initial user namespace, so that our callers' capabilities are in that, too."""
    return os.geteuid() == 0 and os.stat("/proc/self/ns/user").st_ino == _USER_NS_INIT_INO


def _drop_capabilities(keep: frozenset[int]) -> None:
    last = int(_read("/proc/sys/kernel/cap_last_cap"))
    for capability in set(range(last + 1)) - keep:
        with contextlib.suppress(PermissionError):  # without CAP_SETPCAP, and then the set is of no use either
            prctl(_PR_CAPBSET_DROP, capability)
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    permitted = _SETS.unpack(capget(_HEADER, _SETS.size))[1::3]
    kept = [permitted[word] & sum(1 << cap % 32 for cap in keep if cap // 32 == word) for word in (0, 1)]
    capset(_HEADER, _SETS.pack(kept[0], kept[0], 0, kept[1], kept[1], 0))


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
