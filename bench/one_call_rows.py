"""Conversions as one call, beside the two calls that they take otherwise, and beside the kernel's own on a tmpfs.

An owner (owner.py) registers both files, acknowledges and maps in each of them. And what one call costs the daemon
where there is no owner: fallocate and punch of an ordinary file, as a balloon makes them, beside a call whose answer
takes no work. That is CPU time of the daemon, so what else runs on the machine is not in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from bench.conversion_rows import owner
from bench.harness import Mounted, Row, Run, Sample, compare, measure, memfs, now, placements, tmpfs, work
from memfs.contract.conversion import convert, key_of
from memfs.contract.units import PageIndex, PageRange

_SIZE: Final = "size=4g,nr_inodes=100k"
_GIB: Final = 1 << 18  # pages
_RANGES: Final = 512
_MANY: Final = 1000
_VMS_OF_A_PROCESS: Final = 500  # each slot takes six descriptors of it


def rows(run: Run) -> Iterator[Row]:
    """All rows about conversions in one call, and about what a call costs."""
    for name, group in {"in one call": _one_call, "many VMs in one call": _many_vms, "CPU of a call": _cheap}.items():
        if run.wants(name):
            yield from group(run)


def _pin(pid: int, cpu: int) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


def _one_call(run: Run) -> Iterator[Row]:
    with memfs(run, _SIZE) as ours, tmpfs(run, _SIZE) as theirs, owner(ours.path, 1, 1, _GIB) as process:
        for name in ("shared", "private"):
            (theirs.path / name).touch()
        for placement, (cpu, daemon_cpu) in placements().items():
            ours.pin(daemon_cpu)
            _pin(process.pid, cpu)
            yield from _at(run, placement, ours.path, theirs.path, cpu)


def _at(run: Run, placement: str, ours: Path, theirs: Path, cpu: int) -> Iterator[Row]:
    def there_and_back(what: str, directory: Path, count: int, each: int = 1) -> float:
        """Microseconds for one conversion, of two, of `each` pages at a time."""
        return work(what, directory, count, cpu) / count / each / 2e3

    count = run.count(800)
    found = measure(
        {
            "one": lambda: there_and_back("convert-once:1", ours, count),
            "two": lambda: there_and_back("convert:1", ours, count),
            "scattered": lambda: there_and_back("scattered-once", ours, max(1, count // 40), _RANGES),
            "scattered on tmpfs": lambda: there_and_back("scattered", theirs, max(1, count // 40), _RANGES),
        },
        run.repetitions,
    )
    yield compare(
        *("convert a page in one call", placement, found["one"], "us", "in two calls"), found["two"], at_least=1 / 0.6
    )
    yield compare(
        *(f"convert {_RANGES} pages in one call, a page", placement, found["scattered"], "us"),
        *("tmpfs, two calls a page", found["scattered on tmpfs"]),
        at_most=10,
    )
    big = measure(
        {
            "memfs": lambda: 2 * there_and_back(f"convert-once:{_GIB}", ours, 1) / 1e3,
            "tmpfs": lambda: 2 * there_and_back(f"convert:{_GIB}", theirs, 1) / 1e3,
        },
        max(3, run.repetitions // 2),
    )
    yield compare(
        *("convert 1 GiB there and back in one call each", placement, big["memfs"], "ms", "tmpfs, two calls"),
        big["tmpfs"],
        at_least=1 / 1.05,
    )


# -- many VMs -------------------------------------------------------------------------------------------------------


def _many_vms(run: Run) -> Iterator[Row]:
    """Measure as many conversions by a thousand VMs as by one."""
    vms = _MANY // (8 if run.quick else 1)
    with memfs(run, _SIZE) as mounted:
        for placement, (cpu, daemon_cpu) in placements().items():
            mounted.pin(daemon_cpu)
            samples: dict[int, list[float]] = {1: [], vms: []}
            for number in (1, vms):
                root = mounted.path / f"{placement.replace(' ', '-')}-{number}"
                root.mkdir()
                with contextlib.ExitStack() as owners:
                    for first in range(0, number, _VMS_OF_A_PROCESS):
                        in_it = min(_VMS_OF_A_PROCESS, number - first)
                        _pin(owners.enter_context(owner(root, in_it, 4, 16, first)).pid, cpu)
                    _convert_everywhere(root, number, vms * 4)  # does not count
                    samples[number] += [_convert_everywhere(root, number, vms * 4) for _ in range(run.repetitions)]
                shutil.rmtree(root)
            yield compare(
                *(f"conversions in one call by {vms} VMs with 4 slots each", placement, Sample(samples[vms])),
                *("a second", "by one VM", Sample(samples[1])),
                more_is_better=True,
                at_least=0.9,
            )


def _convert_everywhere(root: Path, vms: int, conversions: int) -> float:
    """Convert a page there and back in slot after slot of VM after VM, from four threads. How many a second."""
    work_of: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    for number, directory in enumerate(root / f"{vm}-{slot}" for slot in range(4) for vm in range(vms)):
        files = os.open(directory / "shared", os.O_RDWR), os.open(directory / "private", os.O_RDWR)
        work_of[number % 4].append(files)
    keys = {shared: key_of(shared) for mine in work_of for shared, _ in mine}

    def convert_all(mine: list[tuple[int, int]], count: int) -> None:
        for turn in range(count):
            shared, private = mine[turn % len(mine)]
            page = PageIndex(turn // len(mine) % 16)
            for to_private in (True, False):
                convert(private, keys[shared], [PageRange(page, PageIndex(page + 1))], to_private=to_private)

    threads = [threading.Thread(target=convert_all, args=(mine, conversions // 4)) for mine in work_of]
    started = now()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = now() - started
    for mine in work_of:
        for files in mine:
            for fd in files:
                os.close(fd)
    return conversions / taken


# -- what one call costs --------------------------------------------------------------------------------------------


def _cheap(run: Run) -> Iterator[Row]:
    with memfs(run, _SIZE) as mounted:
        for placement, (cpu, daemon_cpu) in placements().items():
            mounted.pin(daemon_cpu)
            count = run.count(16000)
            calls = ("fallocate", "punch", "ask")
            found = measure({what: partial(_cpu, mounted, what, count, cpu) for what in calls}, run.repetitions)
            for what in ("fallocate", "punch"):
                name = f"CPU of a call: {what} of a page of an ordinary file"
                yield compare(name, placement, found[what], "us", "one without work", found["ask"], at_least=1 / 1.5)


def _cpu(mounted: Mounted, what: str, count: int, cpu: int) -> float:
    """Microseconds of the daemon's CPU time for each call."""
    before = _nanoseconds(mounted)
    work(what, mounted.path, count, cpu)
    return (_nanoseconds(mounted) - before) / count / 1e3


def _nanoseconds(mounted: Mounted) -> int:
    assert mounted.process is not None
    tasks = Path(f"/proc/{mounted.process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
