"""Which users a user namespace knows (user_namespaces(7)). All others look alike in it: the overflow uid, 65534."""

from __future__ import annotations


def uid_outside(uid: int) -> int | None:
    """Return which user of the parent namespace one of ours is; None if there is no such user in ours."""
    for first, outside, count in _uid_map():
        if first <= uid < first + count:
            return outside + uid - first
    return None


def _uid_map() -> list[list[int]]:
    """Return rows of first uid here, first uid outside, how many."""
    try:
        with open("/proc/self/uid_map") as rows:
            return [[int(field) for field in row.split()] for row in rows]
    except FileNotFoundError:  # a kernel without user namespaces
        return [[0, 0, 1 << 32]]
