"""What `memfs top` shows: tables of mounts, and of owners or files, from samples, in so many columns and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfs.cli.watch.sample import SIDES, Sample, name_of, oldest
from memfs.contract.sizes import shown_bytes
from memfs.contract.terminal import printable
from memfs.contract.units import PAGE_SIZE, pages_to_bytes

_HELP: Final = "q quit  space pause  s sort  r reverse  / filter  tab owners, files  arrows scroll"
_MOST_MOUNTS: Final = 7  # rows, where there is a second table below them

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, how a value is written, and whether it is text, which gets what space is left."""

    heading: str
    write: Callable[[Any], str] = str
    is_text: bool = False


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _age(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds else "-"


MOUNTS: Final = {
    "mountpoint": Column("MOUNT", printable, is_text=True),
    "size": Column("SIZE", shown_bytes),
    "used": Column("USED", shown_bytes),
    "private": Column("PRIV", shown_bytes),
    "shared": Column("SHARED", shown_bytes),
    "huge": Column("HUGE", shown_bytes),
    "files": Column("FILES"),
    "owners": Column("OWN"),
    "conversions": Column("CONV/s", _rate),
    "pending": Column("PEND"),
    "age": Column("AGE", _age),
}
OWNERS: Final = {
    "owner": Column("OWNER"),
    "name": Column("NAME", printable, is_text=True),
    "uid": Column("UID"),
    "files": Column("FILES"),
    "private": Column("PRIV", shown_bytes),
    "shared": Column("SHARED", shown_bytes),
    "locked": Column("LOCKED", shown_bytes),
    "rate": Column("ACK/s", _rate),
    "pending": Column("PEND"),
    "age": Column("AGE", _age),
    "mountpoint": Column("MOUNT", printable, is_text=True),
}
FILES: Final = {
    "name": Column("FILE", printable, is_text=True),
    "side": Column("SIDE"),
    "size": Column("SIZE", shown_bytes),
    "used": Column("USED", shown_bytes),
    "locked": Column("LOCKED", shown_bytes),
    "owner": Column("OWNER"),
    "mountpoint": Column("MOUNT", printable, is_text=True),
}
TABLES: Final = {"owners": OWNERS, "files": FILES}


def mount_rows(samples: Sequence[Sample]) -> list[Row]:
    """Return a row for each mount that answers; None is what is not known, or not said by its version."""
    rows: list[Row] = []
    for sample in samples:
        state = sample.state
        if state is None:
            continue
        used, private = state.get("used"), state.get("guest_used")
        rates = sample.conversions
        rows.append(
            {
                "mountpoint": sample.mountpoint,
                "size": state.get("size"),
                "used": used,
                "private": private,
                "shared": None if private is None or used is None else max(0, used - private),
                "huge": private if (state.get("guest_page_size") or 0) > PAGE_SIZE else None,
                "files": state.get("inodes_used"),
                "owners": state.get("owners"),
                "conversions": None if rates is None else sum(rates[side] for side in SIDES),
                "pending": state.get("pending"),
                "age": sample.oldest_pending,
            }
        )
    return rows


def owner_rows(samples: Sequence[Sample], before: Sequence[Sample] = ()) -> list[Row]:
    """Return a row for each owner that we may see."""
    old = {
        (each.mountpoint, owner["owner"]): (each.at, owner["acknowledged"]) for each in before for owner in each.owners
    }
    rows = []
    for sample in samples:
        for owner in sample.owners:
            at, acknowledged = old.get((sample.mountpoint, owner["owner"]), (sample.at, 0))
            files = owner["files"]
            sides = {guest: sum(each["pages"] for each in files if each["guest"] is guest) for guest in (True, False)}
            seconds = sample.at - at
            rows.append(
                {
                    "owner": owner["owner"],
                    "name": owner["name"],
                    "uid": owner.get("uid"),
                    "files": len(files),
                    "private": pages_to_bytes(sides[True]),
                    "shared": pages_to_bytes(sides[False]),
                    "locked": pages_to_bytes(sum(each["locked"] for each in files)),
                    "rate": (owner["acknowledged"] - acknowledged) / seconds if seconds > 0 else None,
                    "pending": len(owner["pending"]),
                    "age": oldest(owner),
                    "mountpoint": sample.mountpoint,
                }
            )
    return rows


def file_rows(samples: Sequence[Sample]) -> list[Row]:
    """Return a row for each file with an owner that we may see."""
    return [
        {
            "name": name_of(sample, each["ino"]),
            "side": "private" if each["guest"] else "shared",
            "size": each["size"],
            "used": pages_to_bytes(each["pages"]),
            "locked": pages_to_bytes(each["locked"]),
            "owner": owner["owner"],
            "mountpoint": sample.mountpoint,
        }
        for sample in samples
        for owner in sample.owners
        for each in owner["files"]
    ]


class Screen:
    """What is shown, and how it was asked for by keys."""

    def __init__(self) -> None:
        self.table = "owners"
        self.paused = False
        self.has_ended = False
        self._sort: dict[str, str | None] = dict.fromkeys(TABLES)
        self._is_reverse = False
        self._filter = ""
        self._is_typing = False
        self._first = 0  # row that is shown

    def press(self, key: str) -> None:
        """Act on a key."""
        if self._is_typing:
            self._type(key)
            return
        match key:
            case "q":
                self.has_ended = True
            case " " | "p":
                self.paused = not self.paused
            case "s":
                names = [None, *TABLES[self.table]]
                name = names[(names.index(self._sort[self.table]) + 1) % len(names)]
                self._sort[self.table] = name
                self._is_reverse = name is not None and not TABLES[self.table][name].is_text
            case "r":
                self._is_reverse = not self._is_reverse
            case "/":
                self._is_typing, self._filter = True, ""
            case "escape":
                self._filter = ""
            case "tab":
                self.table, self._first = ("files" if self.table == "owners" else "owners"), 0
            case "up":
                self._first = max(0, self._first - 1)
            case "down":
                self._first += 1

    def _type(self, key: str) -> None:
        if key in ("enter", "escape"):
            self._is_typing = False
            self._filter = self._filter if key == "enter" else ""
        elif key == "backspace":
            self._filter = self._filter[:-1]
        elif len(key) == 1:
            self._filter += key

    def render(
        self, samples: Sequence[Sample], before: Sequence[Sample], *, height: int | None, clock: str
    ) -> RenderableType:
        """Return what is to be shown, in `height` lines; None: as many as there are."""
        rows = owner_rows(samples, before) if self.table == "owners" else file_rows(samples)
        rows = self._sorted([row for row in rows if self._is_wanted(row)])
        of_rows = {row["mountpoint"] for row in rows}
        mounts = [row for row in mount_rows(samples) if row["mountpoint"] in of_rows or self._is_wanted(row)]
        silent = [Text(f"{printable(each.mountpoint)}: {each.why_not}") for each in samples if each.state is None]
        if height is None:
            return Group(_table(MOUNTS, mounts), *silent, Text(""), _table(TABLES[self.table], rows))
        most = max(1, min(_MOST_MOUNTS, height - 8))
        shown_silent = [_fitting(each) for each in silent[: most // 2]]
        shown_mounts = mounts[: most - len(shown_silent)]
        left = max(0, height - len(shown_mounts) - len(shown_silent) - 5)
        self._first = max(0, min(self._first, len(rows) - left))
        shown = rows[self._first : self._first + left]
        more = len(mounts) + len(silent) - len(shown_mounts) - len(shown_silent)
        return Group(
            _line(self._title(clock, len(samples), more)),
            _table(MOUNTS, shown_mounts),
            *shown_silent,
            Text(""),
            _table(TABLES[self.table], shown, self._sort[self.table]),
            *(Text("") for _ in range(left - len(shown))),
            _line(f"/{printable(self._filter)}_" if self._is_typing else _HELP),
        )

    def _title(self, clock: str, mounts: int, more: int) -> str:
        parts = [f"memfs top  {clock}  {mounts} mounts" + (f" ({more} more)" if more else "")]
        sort = self._sort[self.table]
        parts += [f"sort {TABLES[self.table][sort].heading}{' down' if self._is_reverse else ' up'}"] if sort else []
        parts += [f"filter {printable(self._filter)}"] if self._filter else []
        parts += ["PAUSED"] if self.paused else []
        return "  ".join(parts)

    def _is_wanted(self, row: Row) -> bool:
        return any(self._filter.casefold() in str(row.get(name, "")).casefold() for name in ("name", "mountpoint"))

    def _sorted(self, rows: list[Row]) -> list[Row]:
        name = self._sort[self.table]
        if name is None:
            return rows
        known = [row for row in rows if row[name] is not None]
        return [
            *sorted(known, key=lambda row: row[name], reverse=self._is_reverse),
            *(row for row in rows if row[name] is None),
        ]


def _line(text: str) -> Text:
    return _fitting(Text(text, style="reverse"))


def _fitting(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _table(columns: dict[str, Column], rows: Sequence[Row], sort: str | None = None) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="bold")
    for name, column in columns.items():
        heading = Text(column.heading, style="underline" if name == sort else "")
        if column.is_text:
            table.add_column(heading, no_wrap=True, overflow="ellipsis", ratio=1, min_width=8)
        else:
            table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        values = ((column, row.get(name)) for name, column in columns.items())
        table.add_row(*(Text("-" if value is None else column.write(value)) for column, value in values))
    return table
