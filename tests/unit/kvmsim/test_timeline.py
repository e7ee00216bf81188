"""The page that says what was converted when: what is in it, of whom, and that names in it stay names."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

import pytest

from kvmsim import timeline
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.timeline import Timeline, events_of
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import (
    ConvertBegin,
    ConvertEnd,
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    Notification,
)
from memfs.contract.units import Gfn, GfnRange
from tests.helpers import pages

SHARED, PRIVATE = FileId(1), FileId(2)
MEMORY = GfnRange(Gfn(0), Gfn(64))
#: a slot whose pages are its gfns
SLOT = cast(Memslot, SimpleNamespace(pages_of=lambda gfns: pages(gfns.start, gfns.end)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("kvmsim.timeline.time.monotonic", lambda: now[0])
    return now


def hear(recorded: Timeline, message: Notification, *sides: Side) -> None:
    for side in sides:
        recorded.heard(message, SLOT, GfnRange(Gfn(3), Gfn(5)), side)


def test_events_are_conversions_and_how_long_they_took(clock: list[float]) -> None:
    recorded, both = Timeline(lambda asked: asked.start == 3), (Side.SHARED, Side.PRIVATE)
    ranges = PageRanges.single(pages(3, 5))
    for to_private, began in ((True, 1.0), (False, 2.0)):
        clock[0] = began
        hear(recorded, ConvertBegin(SHARED, PRIVATE, to_private, ranges), *both)
        clock[0] = began + 0.25
        hear(recorded, ConvertEnd(SHARED, PRIVATE, to_private, ranges), *both)
    clock[0] = 3.0
    hear(recorded, Fallocate(PRIVATE, pages(4, 5)), Side.PRIVATE)
    hear(recorded, Fallocate(SHARED, pages(3, 5)), Side.SHARED)
    for side, file in ((Side.PRIVATE, PRIVATE), (Side.SHARED, SHARED)):
        clock[0] = 4.0
        hear(recorded, InvalidateBegin(file, pages(3, 5)), side)
        clock[0] = 4.5
        hear(recorded, InvalidateEnd(file, pages(3, 5)), side)
    assert events_of(recorded.html("run", MEMORY)) == [
        [1.0, 0.25, 3, 2, 1, 1],
        [2.0, 0.25, 3, 2, 0, 1],
        [3.0, 0.0, 3, 2, 1, 0],
        [4.0, 0.5, 3, 2, 0, 1],
    ]


def test_names_stay_names_and_nothing_is_loaded() -> None:
    page = Timeline(lambda _: False).html("<script>alert('@DATA@')</script>\x1b]0;x\x07", MEMORY)
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert "\x1b" not in page
    assert not re.search(r"(?:src|href)=|https?:|url\(", page)


def test_later_events_are_counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_MOST_EVENTS", 3)
    recorded = Timeline(lambda _: False)
    for _ in range(5):
        hear(recorded, Fallocate(PRIVATE, pages(3, 5)), Side.PRIVATE)
    page = recorded.html("run", MEMORY)
    assert len(events_of(page)) == 3
    assert "left out</td><td></td><td>2</td>" in page
