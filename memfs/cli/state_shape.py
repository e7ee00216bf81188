"""What the state of a memfs looks like: names, and the types of what they name.

Whoever may mount a FUSE filesystem for all can call it fuse.memfs and have it say anything, and a memfs may be of
another version. A state of another shape is no state, so that the commands that show many memfs's do so whatever one of
them says. A name that is missing, or null, is what another version does not know; names that we do not know may have
any value.

Rejected: docs/stat.schema.json and a library for such (that file is for those who read the state, and is not installed;
a test compares both).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any, Final

#: A type; {name: shape}; {type: shape} for any names that are of that type, as text; [shape] for a list of such
Shape = Any

_MOST: Final = 1 << 64  # that a number may be, so that there is a float for it
_CONVERSIONS: Final = {"count": int, "pages": int}
_TALLY: Final = {"count": int, "pages": int, "seconds": float, "longest": float, "buckets": {float: int}}
_FILE: Final = {"file": int, "ino": int, "size": int, "pages": int, "guest": bool, "locked": int}
_PENDING: Final = {"notification": str, "request": int, "age": float}
_OWNER: Final = {"owner": int, "name": str, "uid": int, "acknowledged": int, "files": [_FILE], "pending": [_PENDING]}
STATE: Final[dict[str, Shape]] = {
    **dict.fromkeys(("version", "mountpoint", "options", "socket", "backing", "huge"), str),
    **dict.fromkeys(("no_passthrough_because", "no_survival_because", "keeper_socket"), str),
    **dict.fromkeys(("guest_swappable", "passthrough", "survives"), bool),
    **dict.fromkeys(("pid", "size", "used", "guest_used", "guest_page_size", "min_size", "freed_backlog"), int),
    **dict.fromkeys(("memory_limit", "generation", "restarts", "nr_inodes", "inodes_used", "open_handles"), int),
    **dict.fromkeys(("descriptors", "descriptors_used", "page_maps", "page_maps_used"), int),
    **dict.fromkeys(("your_descriptors", "your_page_maps", "owners", "registered_files", "owners_fenced"), int),
    **dict.fromkeys(("connections", "rejected", "acknowledged", "pending"), int),
    **dict.fromkeys(("pool", "pool_free", "pool_reserved"), int),
    **dict.fromkeys(("machine_shmem_huge", "machine_shmem_huge_mapped"), int),
    "last_outage": float,
    "notifications": {str: _TALLY},
    "conversions": {"private": _CONVERSIONS, "shared": _CONVERSIONS},
    "registry": [_OWNER],
}
_MAY_BE_NULL: Final = frozenset({"uid", "request"})  # or be missing


def misfit(state: dict[str, Any]) -> str | None:
    """Return the name of what is not as it is said here, of a state from JSON; None if all is."""
    known = {name: value for name, value in state.items() if value is not None and name in STATE}
    return next((name for name, value in known.items() for _ in _misfits(value, STATE[name])), None)


def _misfits(value: object, shape: Shape) -> Iterator[object]:
    """Yield what does not fit."""
    match value, shape:
        case list(), [one]:
            for each in value:
                yield from _misfits(each, one)
        case dict(), dict() if any(isinstance(name, type) for name in shape):
            ((kind, one),) = shape.items()
            for name, each in value.items():
                if kind is float and not _is_number(name):
                    yield name
                yield from _misfits(each, one)
        case dict(), dict():
            for name, one in shape.items():
                if name not in _MAY_BE_NULL or value.get(name) is not None:
                    yield from _misfits(value.get(name), one)
        case bool(), _ if shape is not bool:
            yield value
        case ((int() | float()), _) if shape is float or (shape is int and isinstance(value, int)):
            if not 0 <= value < _MOST:  # nor is that so of NaN
                yield value
        case _ if not (isinstance(shape, type) and isinstance(value, shape)):
            yield value


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False
