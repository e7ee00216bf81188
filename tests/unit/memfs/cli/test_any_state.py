"""What a mount says of itself may be anything at all: it is shown, or it is no state."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from memfs.cli.state_shape import misfit
from memfs.cli.watch.sample import Sample, rates
from memfs.cli.watch.screen import Screen

NAMES = [
    *("size", "used", "registry", "notifications", "conversions", "pending", "owner", "name", "files", "ino", "age"),
    *("acknowledged", "private", "shared", "count", "pages", "buckets", "guest", "locked", "file", "seconds"),
    *("longest", "guest_used", "guest_page_size", "request", "notification"),
]
NONE = {side: {"count": 0, "pages": 0} for side in ("private", "shared")}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=20,
)


#: what is no state by far is drawn too often, and what is nearly one too seldom
NUMBER = st.integers(0, 1 << 63) | st.just(0)
TALLIES = st.fixed_dictionaries(
    {"count": NUMBER, "pages": NUMBER, "seconds": st.floats(0, 1e18), "longest": st.floats(0, 1e18)}
    | {"buckets": st.dictionaries(st.floats(allow_nan=False, allow_infinity=False).map(str), NUMBER, max_size=3)}
)
FILES = st.fixed_dictionaries(
    dict.fromkeys(("file", "ino", "size", "pages", "locked"), NUMBER) | {"guest": st.booleans()}
)
OWNERS = st.fixed_dictionaries(
    {"owner": NUMBER, "name": st.text(max_size=5), "uid": st.none() | NUMBER, "acknowledged": NUMBER}
    | {"files": st.lists(FILES, max_size=2), "pending": st.just([])}
)
CONVERSIONS = st.fixed_dictionaries({"count": NUMBER, "pages": NUMBER})
likely = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("size", "used", "guest_used", "guest_page_size", "pending"), st.none() | NUMBER),
        "conversions": st.none() | st.fixed_dictionaries({"private": CONVERSIONS, "shared": CONVERSIONS}),
        "notifications": st.none() | st.dictionaries(st.text(max_size=3), TALLIES, max_size=2),
        "registry": st.none() | st.lists(OWNERS, max_size=2),
    },
)


@given(likely | st.dictionaries(st.sampled_from(NAMES), anything, max_size=8))
def test_any_state_is_shown_or_refused(said: dict[str, Any]) -> None:
    assume(misfit(said) is None)
    sample, screen = Sample("/mnt", said, "", 1.0), Screen()
    console = Console(file=io.StringIO(), width=80, height=24)
    for _ in range(2):
        console.print(screen.render([sample], [sample], height=24, clock=""))
        screen.press("tab")
    rates(sample, replace(sample, at=2.0))
    rates(Sample("/mnt", {"conversions": NONE, "notifications": {}}, "", 0.0), sample)


@given(likely)
def test_what_is_likely_is_a_state(said: dict[str, Any]) -> None:
    assert misfit(said) is None
