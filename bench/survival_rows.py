"""What it costs that a mount survives its daemon (survive=on), and how long its callers wait when that is killed.

The outage is what a caller of statvfs(2) and unlink(2) waits who comes right after the kill. Kills lie far enough apart
that memfs does not give up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.conversion_rows import owner
from bench.harness import Mounted, Row, Run, Sample, alone, compare, measure, memfs, pin, placements, work

_SIZE: Final = "size=1g,nr_inodes=300k"
_FILES: Final = (20, 1000, 10_000, 100_000)
_BETWEEN: Final = 2.5  # seconds between two kills
_COUNT: Final = 1000
_READS: Final = 20_000
_PAGES: Final = 1 << 12  # of the files that are converted
_LEAST: Final = 1 / 1.15  # of the speed without


def rows(run: Run) -> Iterator[Row]:
    """All rows about survival."""
    if run.wants("survive=on"):
        yield from _cost(run)
        yield from _cost_of_conversions(run)
    if run.wants("outage"):
        yield from _reads(run)
        yield from _outages(run)


def _cost(run: Run) -> Iterator[Row]:
    with memfs(run, f"{_SIZE},survive=off") as off, memfs(run, f"{_SIZE},survive=on") as on:
        for placement, (client_cpu, daemon_cpu) in placements().items():
            for mounted in (off, on):
                os.sched_setaffinity(_worker(mounted), {daemon_cpu})
            for name, what in (
                ("survive=on: create+stat+unlink", "create-stat-unlink"),
                ("survive=on: fallocate one page", "fallocate"),
                ("survive=on: punch one page", "punch"),
            ):
                subjects = {
                    key: partial(_each, what, mounted, run.count(_COUNT), client_cpu)
                    for key, mounted in (("off", off), ("on", on))
                }
                samples = measure(subjects, run.repetitions)
                yield compare(name, placement, samples["on"], "us", "survive=off", samples["off"], at_least=_LEAST)


def _cost_of_conversions(run: Run) -> Iterator[Row]:
    """Of one page, there and back, with an owner that acknowledges."""
    with (
        memfs(run, f"{_SIZE},survive=off") as off,
        memfs(run, f"{_SIZE},survive=on") as on,
        owner(off.path, 1, 1, _PAGES) as owner_of_off,
        owner(on.path, 1, 1, _PAGES) as owner_of_on,
    ):
        for placement, (client_cpu, daemon_cpu) in placements().items():
            for mounted, process in ((off, owner_of_off), (on, owner_of_on)):
                os.sched_setaffinity(_worker(mounted), {daemon_cpu})
                pin(process, client_cpu)
            for name, what in (("by two calls", "convert:1"), ("in one call", "convert-once:1")):
                subjects = {
                    key: partial(_each, what, mounted, run.count(_COUNT), client_cpu)
                    for key, mounted in (("off", off), ("on", on))
                }
                samples = measure(subjects, run.repetitions)
                row = f"survive=on: convert a page {name}"
                yield compare(row, placement, samples["on"], "us", "survive=off", samples["off"], at_least=_LEAST)


def _reads(run: Run) -> Iterator[Row]:
    """Compare reads with passthrough while nobody serves: the keeper is stopped for as long."""
    with memfs(run, f"{_SIZE},survive=on,passthrough=on") as mounted, (mounted.path / "file").open("w+b") as file:
        file.write(bytes(1 << 20))
        file.flush()
        samples: dict[str, list[float]] = {"served": [], "not served": []}
        for _ in range(run.repetitions):
            samples["served"].append(_pread(file.fileno(), run.count(_READS)))
            time.sleep(_BETWEEN)
            worker = _worker(mounted)
            keeper = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill(keeper, signal.SIGSTOP)
            try:
                os.kill(worker, signal.SIGKILL)
                samples["not served"].append(_pread(file.fileno(), run.count(_READS)))
            finally:
                os.kill(keeper, signal.SIGCONT)
        name, reference = "outage: pread of 4 KiB with passthrough", "while it is served"
        yield compare(
            *(name, "anywhere", Sample(samples["not served"]), "us", reference, Sample(samples["served"])), at_least=0.9
        )


def _pread(fd: int, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        os.pread(fd, 4096, 8192)
    return (time.perf_counter() - started) / count * 1e6


def _each(what: str, mounted: Mounted, count: int, cpu: int) -> float:
    return work(what, mounted.path, count, cpu) / count / 1e3


def _outages(run: Run) -> Iterator[Row]:
    with memfs(run, f"{_SIZE},survive=on") as mounted:
        for files in _FILES[: 2 if run.quick else None]:
            _fill(mounted.path, files)
            waits = [_wait(mounted) for _ in range(run.repetitions)]
            yield alone(f"outage, {files:,} files", "anywhere", Sample(waits), "ms")
            resident = _resident(_worker(mounted))
            yield alone(f"outage, {files:,} files: resident afterwards", "anywhere", Sample([resident]), "MiB")


def _fill(path: Path, files: int) -> None:
    for number in range(len(list(path.iterdir())), files):
        os.close(os.open(path / str(number), os.O_CREAT | os.O_WRONLY))


def _wait(mounted: Mounted) -> float:
    """Kill the worker, and return how many milliseconds a caller then waits."""
    victim = mounted.path / "victim"
    victim.touch()
    time.sleep(_BETWEEN)
    os.kill(_worker(mounted), signal.SIGKILL)
    begun = time.perf_counter()
    os.statvfs(mounted.path)
    victim.unlink()
    return (time.perf_counter() - begun) * 1e3


def _worker(mounted: Mounted) -> int:
    state: dict[str, Any] = json.loads(os.getxattr(mounted.path, "user.memfs.stat"))
    return int(state["pid"])


def _resident(pid: int) -> float:
    """Return a process's own memory in MiB."""
    said = subprocess.run(["grep", "RssAnon", f"/proc/{pid}/status"], capture_output=True, text=True, check=True)
    return int(said.stdout.split()[1]) / 1024
