"""What `memfs web` shows, kept up to date for as long as somebody looks: one look at all mounts for all browsers.

A browser is sent what is the latest whenever it has taken what was sent before; nothing is queued for it. So one that
stands still costs nothing, and holds up neither the others nor any memfs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

import trio

from memfs.cli.command import CommandError
from memfs.cli.timed_call import TimedCall
from memfs.cli.watch.memory import PAUSE, GuestMemory
from memfs.cli.watch.sample import Sample, Watcher, name_of, oldest, pairs
from memfs.contract.terminal import printable
from memfs.contract.units import PageIndex, PageRange, bytes_to_pages

_MOST_POINTS: Final = 600  # of the time line
_MOST_LOOKS: Final = 8  # at memory, for each event


class Live:
    """The latest samples, and the time line of those before, taken every so many seconds while somebody looks."""

    def __init__(self, watcher: Watcher, interval: float) -> None:
        self._watcher: Final = watcher
        self._interval: Final = interval
        self._samples: list[Sample] = []
        self._points: Final[deque[dict[str, Any]]] = deque(maxlen=_MOST_POINTS)
        self._viewers = 0
        self._number = 0  # of the latest samples
        self._changed = trio.Event()
        self._wanted = trio.Event()

    async def run(self) -> None:
        """Take samples, until cancelled."""
        while True:
            if not self._viewers:
                self._wanted = trio.Event()
                await self._wanted.wait()
            self._samples = await trio.to_thread.run_sync(self._watcher.look, abandon_on_cancel=True)
            self._number += 1
            self._points.append(
                {"time": time.time(), "mounts": {each.mountpoint: _point(each) for each in self._samples}}
            )
            changed, self._changed = self._changed, trio.Event()
            changed.set()
            await trio.sleep(self._interval)

    @contextmanager
    def viewed(self) -> Iterator[None]:
        """Have samples taken within a with statement."""
        self._viewers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._viewers -= 1

    @property
    def viewers(self) -> int:
        """How many look."""
        return self._viewers

    async def later_than(self, number: int) -> int:
        """Wait for samples later than those of a number, and return theirs."""
        while self._number <= number:
            await self._changed.wait()
        return self._number

    @property
    def history(self) -> list[dict[str, Any]]:
        """The time line."""
        return list(self._points)

    @property
    def latest(self) -> dict[str, Any]:
        """The latest point of the time line, and the state of each mount."""
        return {"point": self._points[-1], "mounts": [_described(each) for each in self._samples]}

    def files_of(self, mountpoint: str, owner: int, ino: int) -> list[tuple[str, int]]:
        """Return path and number of the files of the memory of which an owner's file is a part.

        Raises CommandError for what is gone, or has no name that can be seen.
        """
        for sample in self._samples:
            for each in sample.owners if sample.mountpoint == mountpoint else ():
                for files in pairs(each) if each["owner"] == owner else ():
                    inos = [file["ino"] for file in files]
                    if ino in inos:
                        if missing := [number for number in inos if number not in sample.paths]:
                            raise CommandError(f"inode {missing[0]} has no name here (any more), or not one to be seen")
                        return [(sample.paths[number], number) for number in inos]
        raise CommandError("this VM is gone")


class MemoryMap:
    """The picture of one VM's memory, or of a part, for one browser."""

    def __init__(self, live: Live, mountpoint: str, owner: int, ino: int, window: PageRange | None) -> None:
        self._live: Final = live
        self._asked: Final = (mountpoint, owner, ino)
        self._window: Final = window
        self._files: list[tuple[str, int]] = []
        self._look: TimedCall[dict[str, Any]] | None = None

    async def draw(self) -> dict[str, Any]:
        """Return it as it is known by now, or why it cannot be drawn."""
        try:
            files = self._live.files_of(*self._asked)
            if self._look is None or files != self._files:
                self._files, memory = files, GuestMemory(files, self._window)
                self._look = TimedCall("memfs", lambda: _drawn(memory))
            for _ in range(_MOST_LOOKS):
                drawn = await trio.to_thread.run_sync(self._look.call, abandon_on_cancel=True)
                if drawn["complete"]:
                    break
                await trio.sleep(PAUSE)
        except OSError as error:
            return {"error": printable(f"{error.filename}: {error.strerror}")}
        except CommandError as error:
            return {"error": printable(error)}
        return drawn


def _drawn(memory: GuestMemory) -> dict[str, Any]:
    known, is_all = memory.look()
    picture = known.picture()
    return {
        "start": picture.pages.start,
        "end": picture.pages.end,
        "size": memory.pages,
        "cell": picture.pages_per_cell,
        "columns": picture.columns,
        "cells": "".join(map(str, picture.cells.tolist())),
        "totals": picture.totals,
        "summary": picture.summary,
        "complete": is_all,
    }


def window_of(start: int, end: int) -> PageRange | None:
    """Return a part of memory, in pages; None for all of it."""
    return PageRange(PageIndex(start), PageIndex(end)) if 0 <= start < end < 1 << 50 else None


def _point(sample: Sample) -> dict[str, Any]:
    return {
        "conversions": sample.conversions,
        "pages": sample.pages,
        "latency": None if sample.latency is None else asdict(sample.latency),
    }


def _described(sample: Sample) -> dict[str, Any]:
    state = sample.state
    if state is None:
        return {"mountpoint": sample.mountpoint, "error": sample.why_not}
    told = (
        "version",
        "size",
        "used",
        "guest_used",
        "inodes_used",
        "open_handles",
        "owners",
        "pending",
        "owners_fenced",
    )
    return {
        "mountpoint": sample.mountpoint,
        **{name: state.get(name) for name in (*told, "restarts", "freed_backlog", "backing", "passthrough")},
        "age": sample.oldest_pending,
        "vms": [vm for owner in sample.owners for vm in _vms(sample, owner)],
    }


def _vms(sample: Sample, owner: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for files in pairs(owner):
        private = sum(each["pages"] for each in files if each["guest"])
        shared = sum(each["pages"] for each in files if not each["guest"])
        yield {
            "owner": owner["owner"],
            "name": printable(owner["name"]),
            "uid": owner.get("uid"),
            "ino": files[-1]["ino"],
            "files": [printable(name_of(sample, each["ino"])) for each in files],
            "pages": max(bytes_to_pages(each["size"]) for each in files),
            "private": private,
            "shared": shared,
            "locked": sum(each["locked"] for each in files),
            "pending": len(owner["pending"]),
            "age": oldest(owner),
        }
