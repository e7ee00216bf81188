"""What `memfs top` shows on a small terminal, what its keys do, and the rates and latencies that it is told of."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from memfs.cli.watch.sample import Sample, latency
from memfs.cli.watch.screen import Screen

EVIL = "vm\x1b]0;x\x07[bold]"


def owner(number: int, name: str, pages: int) -> dict[str, Any]:
    files = [
        {"file": 1, "ino": 10 * number + guest, "size": 1 << 30, "pages": pages, "guest": bool(guest), "locked": 0}
        for guest in (0, 1)
    ]
    pending = [{"notification": "ConvertBegin", "age": 1.5}] if number == 2 else []
    return {"owner": number, "name": name, "uid": 0, "acknowledged": 7, "files": files, "pending": pending}


def sample(mountpoint: str, owners: int = 3) -> Sample:
    numbers = range(1, owners + 1)
    state = {
        "size": 1 << 40,
        "used": 999 << 30,
        "guest_used": 600 << 30,
        "guest_page_size": 2 << 20,
        "inodes_used": 1_000_000,
        "owners": owners,
        "pending": 1,
        "registry": [owner(number, EVIL if number == 1 else f"vm-{number}", 100 * number) for number in numbers],
    }
    rates = {"private": 12345.0, "shared": 0.25}
    return Sample(mountpoint, state, "", 5.0, conversions=rates, pages=rates, paths={10: f"{mountpoint}/{EVIL}"})


def shown(screen: Screen, *samples: Sample) -> list[str]:
    console = Console(width=80, height=24, record=True, file=open("/dev/null", "w"), markup=False)  # noqa: SIM115
    with console.file:
        console.print(screen.render(samples, samples, height=24, clock="12:00:00"), end="")
        return console.export_text().split("\n")


def test_eighty_columns_and_24_lines_are_enough_whatever_there_is() -> None:
    for mounts, owners in ((0, 0), (1, 1), (30, 0), (30, 40)):
        samples = [sample(f"/mnt/a/long/path/to/guest-{number}", owners) for number in range(mounts)]
        for table in ("owners", "files"):
            screen = Screen()
            screen.table = table
            lines = shown(screen, *samples)
            assert lines.pop() == ""  # after the last line
            assert len(lines) == 24
            assert all(len(line) <= 80 and line.isprintable() for line in lines)


def test_values_are_in_it() -> None:
    screen = Screen()
    text = "\n".join(shown(screen, sample("/mnt/guest"), Sample("/mnt/stopped")))
    for part in ("/mnt/guest", "1.0T", "999G", "600G", "399G", "1000000", "12345", "1.5s", "vm-3", "does not answer"):
        assert part in text
    screen.press("tab")
    assert "inode 11" in "\n".join(shown(screen, sample("/mnt")))


def test_memfs_of_another_version_is_shown_as_far_as_it_says_something() -> None:
    older = Sample("/mnt", {"version": "0.0.1", "used": 1 << 20, "registry": []})
    assert "1.0M" in "\n".join(shown(Screen(), older))


def test_keys_sort_filter_pause_and_end() -> None:
    screen, one = Screen(), sample("/mnt", owners=3)

    def order() -> list[str]:
        return [line.split()[0] for line in shown(screen, one)[5:8] if line.strip()[:1].isdigit()]

    for _ in range(5):  # OWNER, NAME, UID, FILES, PRIV
        screen.press("s")
    assert order() == ["3", "2", "1"]
    screen.press("r")
    assert order() == ["1", "2", "3"]
    for key in "/vm-2":
        screen.press(key)
    screen.press("enter")
    assert order() == ["2"]
    for key in "/q":  # is part of a name now
        screen.press(key)
    assert not screen.has_ended
    screen.press("escape")
    screen.press(" ")
    assert screen.paused
    screen.press("q")
    assert screen.has_ended


def tally(*buckets: int, longest: float) -> dict[str, Any]:
    bounds = dict(zip(("0.001", "0.01", "0.1"), buckets, strict=False))
    return {"count": buckets[-1], "pages": 0, "seconds": 0.0, "longest": longest, "buckets": bounds}


def test_latency_is_of_what_was_acknowledged_in_between() -> None:
    before = {"Fallocate": tally(5, 5, 5, 6, longest=3.0)}
    assert latency(before, before) is None
    found = latency(
        before, {"Fallocate": tally(5, 105, 105, 106, longest=3.0), "ConvertBegin": tally(0, 0, 2, 2, longest=0.05)}
    )
    assert found is not None
    assert found.buckets == [(0.01, 100), (0.1, 2)]
    assert (found.count, found.p50, found.p99, found.longest) == (102, 0.01, 0.05, 0.05)
