"""What was converted when, and how long it took, as a page in HTML that needs nothing else (`kvmsim run --timeline`).

It is made of what memfs notifies of: a conversion, or an invalidation, takes from its begin to its end; a fallocate has
no end. Who asked for it is the guest, if the VMM was converting these pages at that moment, or else somebody outside.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from memfs.contract.protocol.messages import ConvertBegin, ConvertEnd, Fallocate, InvalidateBegin, Notification
from memfs.contract.terminal import printable
from memfs.contract.units import PAGE_SIZE, GfnRange, PageRange

_MOST_EVENTS: Final = 100_000  # that are kept; the page is a few megabytes then
_QUANTILES: Final = (0.5, 0.99, 1.0)  # columns of the table


class Timeline:
    """The events of a run. Its `heard` is one of a VM's listeners."""

    def __init__(self, is_the_guests: Callable[[PageRange], bool]) -> None:
        self._is_the_guests: Final = is_the_guests
        self._started: Final = time.monotonic()
        self._begun: Final[dict[object, float]] = {}  # by the file, or the files, that one event at a time is about
        self._events: Final[list[list[float]]] = []  # seconds, how many, gfn, pages, kind, whether the guest asked
        self._left_out = 0

    def heard(self, message: Notification, slot: Memslot, gfns: GfnRange, side: Side) -> None:
        """Take note of a notification."""
        now = time.monotonic() - self._started
        if isinstance(message, ConvertBegin | ConvertEnd):
            key: object = (message.shared, message.private)
            pages = slot.pages_of(gfns)
        else:
            key, pages = message.file, message.pages
        if isinstance(message, ConvertBegin | InvalidateBegin):
            self._begun[key] = now
            return
        if side is not Side.PRIVATE:  # the other half of the same, or shared memory that comes and goes
            return
        began = now if isinstance(message, Fallocate) else self._begun.get(key, now)
        to_private = message.to_private if isinstance(message, ConvertEnd) else isinstance(message, Fallocate)
        if len(self._events) == _MOST_EVENTS:
            self._left_out += 1
            return
        by_guest = self._is_the_guests(pages)
        self._events.append([began, now - began, gfns.start, len(gfns), int(to_private), int(by_guest)])

    def write(self, title: str, gfns: GfnRange, path: str) -> None:
        """Write the page into a file. Raises OSError."""
        Path(path).write_text(self.html(title, gfns))

    def html(self, title: str, gfns: GfnRange) -> str:
        """Return the page. `gfns`: the guest's memory."""
        seconds = time.monotonic() - self._started
        data = {"events": [[round(value, 7) for value in each] for each in self._events], "seconds": seconds}
        data |= {"start": gfns.start, "end": gfns.end}
        template = (files("kvmsim") / "timeline.html").read_text()
        values = {
            "TITLE": escape(printable(title)),
            "ROWS": "".join(map(_row, self._summary())),
            "DATA": json.dumps(data).replace("<", "\\u003c"),
        }
        for name, value in values.items():
            template = template.replace(f"@{name}@", value)
        return template

    def _summary(self) -> list[list[str]]:
        """Return by direction, and who asked, how many there were, of how much memory, and how long they took."""
        rows = []
        for to_private, direction in ((1, "to private"), (0, "to shared")):
            for by_guest, who in ((1, "guest"), (0, "others")):
                here = [each for each in self._events if each[4:] == [to_private, by_guest]]
                times = sorted(each[1] for each in here)
                kib = sum(int(each[3]) for each in here) * PAGE_SIZE >> 10
                quantiles = [_shown(times, share) for share in _QUANTILES]
                rows.append([direction, who, f"{len(here):,}", f"{kib:,} KiB", *quantiles])
        if self._left_out:
            rows.append(["later ones, left out", "", f"{self._left_out:,}", *[""] * 4])
        return rows


def _row(cells: list[str]) -> str:
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"


def _shown(times: list[float], share: float) -> str:
    if not times:
        return "-"
    return f"{1000 * times[min(len(times) - 1, int(share * len(times)))]:.3f} ms"


def events_of(page: str) -> list[Any]:
    """Return the events that a page has in it, for programs: start, seconds, gfn, pages, to private, by the guest."""
    data = page.partition('id="data">')[2].partition("</script>")[0]
    events: list[Any] = json.loads(data)["events"]
    return events
