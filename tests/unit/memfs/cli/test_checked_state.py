"""What a mount says of itself may be anything at all: it is shown, or it is said that it makes no sense."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from memfs.cli.command import CommandError
from memfs.cli.watch.checked_state import checked
from memfs.cli.watch.sample import Sample, latency
from memfs.cli.watch.screen import Screen

NAMES = [
    *("size", "used", "registry", "notifications", "conversions", "pending", "owner", "name", "files", "ino", "age"),
    *("acknowledged", "private", "shared", "count", "pages", "buckets", "guest", "locked", "file", "seconds"),
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(NAMES), anything, max_size=8))
def test_any_state_is_shown_or_refused(said: dict[str, Any]) -> None:
    try:
        state = checked(said)
    except CommandError:
        return
    sample, screen = Sample("/mnt", state, "", 1.0), Screen()
    console = Console(file=io.StringIO(), width=80, height=24)
    for _ in range(2):
        console.print(screen.render([sample], [sample], height=24, clock=""))
        screen.press("tab")
    latency(state["notifications"], state["notifications"])


def test_what_memfs_says_is_kept() -> None:
    tally = {"count": 2, "pages": 3, "seconds": 0.5, "longest": 0.4, "buckets": {"0.001": 1, "10.0": 2}}
    file = {"file": 1, "ino": 2, "size": 3, "pages": 4, "guest": True, "locked": 0}
    owner = {"owner": 1, "name": "vm", "uid": 0, "acknowledged": 5, "files": [file], "pending": [{"age": 0.5}]}
    sides = {side: {"count": 1, "pages": 2} for side in ("private", "shared")}
    said = {"size": 5, "used": 4, "registry": [owner], "notifications": {"Fallocate": tally}, "conversions": sides}
    assert checked(said).items() >= said.items()
