"""Garbage collection: nothing of ours waits for it, so that nobody waits for it.

A full collection looks at every object there is. With a hundred thousand files it stands still for a tenth of a second,
and it comes each time their number has grown by a quarter: one user's files, everybody's pause. So there are none. What
is allocated and freed soon is collected (young generations, which are of bounded size); all else is freed by reference
counts, when the last reference goes. That is a rule for the code: whatever ends (a session, a registration, a file that
is unlinked) breaks the cycles that it is in, and an exception that is kept and raised later is let go of. A mount with
`--check` collects nothing at all, and says in the end what would have been left.

Rejected: gc.disable() (trio and the standard library may make a cycle, of which most die young); a full collection when
nothing else is to be done (the next request comes in its middle); gc.freeze() now and then (nothing thaws).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_NEVER: Final = 2**31 - 1  # collections of the middle generation


def collect_no_more(*, young: bool = True) -> None:
    """Have no full collections from now on, nor, unless `young`, any at all, and never look at what there is now."""
    gc.collect()
    gc.freeze()
    youngest, middle, _ = gc.get_threshold()
    gc.set_threshold(youngest if young else 0, middle, _NEVER)


@contextmanager
def no_collection() -> Iterator[None]:
    """Allocate what stays: nothing is collected within the block, and never is what there is in its end."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def check() -> None:
    """Raise AssertionError if objects of ours are left to the collector; frees them. Takes two full collections."""
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        kinds = (type(garbage) for garbage in gc.garbage)
        ours = Counter(kind.__qualname__ for kind in kinds if kind.__module__.startswith("memfs."))
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.collect()
    found = ", ".join(f"{count} {name}" for name, count in sorted(ours.items()))
    assert not ours, f"left to the garbage collector: {found}"
