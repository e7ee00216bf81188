"""memfs as a filesystem, beside a tmpfs and an ordinary pyfuse3 filesystem: data, mappings, allocation, names, memory.

Data and mappings of a memfs with passthrough never reach its daemon, so where that runs does not matter; all else is
measured with daemon and client on one CPU and on two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from bench.harness import Mounted, Row, Run, Sample, compare, measure, memfs, placements, plain, tmpfs, work

_MIB: Final = 1 << 20
_SIZE: Final = "size=2600m,nr_inodes=300k"  # of every filesystem measured
_FILES: Final = 100_000
_MEMORY_TARGET: Final = 100  # MiB
_SHARE_TARGET: Final = 30  # microseconds

TMPFS, PASSTHROUGH, CACHED, HUGE, PLAIN = (
    "tmpfs",
    "memfs",
    "memfs passthrough=off",
    "memfs huge=always",
    "plain pyfuse3",
)


@dataclass(frozen=True)
class Work:
    """A workload of client.c and how its rows come about."""

    name: str
    what: str
    count: int
    unit: str
    convert: Callable[[float, int], float]  #: nanoseconds and count to the unit
    more_is_better: bool
    subjects: tuple[str, ...]
    targets: dict[str, float]  #: subject: the least ratio to the reference
    reference: str = TMPFS
    anywhere: bool = True  #: whether it is measured in every placement


def _microseconds(nanoseconds: float, count: int) -> float:
    return nanoseconds / count / 1e3


def _milliseconds(nanoseconds: float, _count: int) -> float:
    return nanoseconds / 1e6


def _gigabytes(nanoseconds: float, count: int) -> float:
    return count * _MIB / nanoseconds


def _stream(name: str, what: str, targets: dict[str, float]) -> Work:
    return Work(name, what, 256, "GB/s", _gigabytes, True, _DATA, targets, anywhere=False)


def _each(
    name: str, what: str, count: int, subjects: tuple[str, ...], targets: dict[str, float], **more: object
) -> Work:
    return Work(name, what, count, "us", _microseconds, False, subjects, targets, **more)  # type: ignore[arg-type]


_DATA: Final = (TMPFS, PASSTHROUGH, HUGE, CACHED, PLAIN)
_ALLOCATION: Final = (TMPFS, PASSTHROUGH, CACHED, HUGE)  # an ordinary pyfuse3 filesystem has no fallocate
_NAMES: Final = (TMPFS, PASSTHROUGH, PLAIN)
WORKS: Final = (
    _each("4 KiB random pread", "pread", 24000, _DATA, {PASSTHROUGH: 0.9, HUGE: 0.9}, anywhere=False),
    _each("4 KiB random pwrite", "pwrite", 24000, _DATA, {PASSTHROUGH: 0.9, HUGE: 0.9}, anywhere=False),
    _stream("1 MiB sequential read", "read", {PASSTHROUGH: 0.9, HUGE: 0.9}),
    _stream("1 MiB sequential write", "write", {PASSTHROUGH: 0.9, HUGE: 1.2}),
    _each("mmap first touch of a page", "touch", 16384, _DATA, {PASSTHROUGH: 0.9, HUGE: 0.9}, anywhere=False),
    _each("mmap re-touch of a page", "retouch", 16384, _DATA, {PASSTHROUGH: 0.9, HUGE: 0.9}, anywhere=False),
    Work("fallocate 1 GiB", "fallocate-big", 1024, "ms", _milliseconds, False, _ALLOCATION, {PASSTHROUGH: 0.9}),
    Work("punch 1 GiB", "punch-big", 1024, "ms", _milliseconds, False, _ALLOCATION, {PASSTHROUGH: 0.9}),
    _each("fallocate one page", "fallocate", 2000, _ALLOCATION, {}),
    _each("punch one page", "punch", 2000, _ALLOCATION, {}),
    _each("stat", "stat", 4000, _NAMES, {}),
    _each("create+unlink", "create-unlink", 1000, _NAMES, {}),
    _each("create+unlink", "create-unlink", 1000, (PLAIN, PASSTHROUGH), {}, reference=PLAIN),
    _each("create+stat+unlink", "create-stat-unlink", 1000, (PLAIN, PASSTHROUGH), {PASSTHROUGH: 1}, reference=PLAIN),
    Work("readdir of 10,000 entries", "readdir", 10000, "ms", _milliseconds, False, _NAMES, {}),
)  # fmt: skip


@contextlib.contextmanager
def _mounted(run: Run) -> Iterator[dict[str, Mounted]]:
    with contextlib.ExitStack() as stack:
        yield {
            TMPFS: stack.enter_context(tmpfs(run, _SIZE)),
            PASSTHROUGH: stack.enter_context(memfs(run, _SIZE)),
            CACHED: stack.enter_context(memfs(run, f"{_SIZE},passthrough=off")),
            HUGE: stack.enter_context(memfs(run, f"{_SIZE},huge=always")),
            PLAIN: stack.enter_context(plain(run)),
        }


def rows(run: Run) -> Iterator[Row]:
    """Measure, a row at a time."""
    with _mounted(run) as filesystems:
        for each in WORKS:
            if run.wants(each.name):
                yield from _rows_of(each, run, filesystems)
    if run.wants("fallocate one page, the daemon's share"):
        yield from _share(run)
    if run.wants("memory of the daemon"):
        yield _memory(run)


def _rows_of(each: Work, run: Run, filesystems: dict[str, Mounted]) -> Iterator[Row]:
    where = placements()
    # With one pair of CPUs for all the data path says most when the daemon does not compete with its client.
    chosen = where if each.anywhere else dict([list(where.items())[-1]])
    count = each.count if each.unit == "GB/s" or each.what == "readdir" else run.count(each.count)
    for placement, (client_cpu, daemon_cpu) in chosen.items():
        for name in each.subjects:
            filesystems[name].pin(daemon_cpu)
        samples = measure(
            {name: partial(_once, each, filesystems[name], count, client_cpu) for name in each.subjects},
            run.repetitions,
        )
        for name in each.subjects:
            if name != each.reference:
                yield compare(
                    *(f"{each.name}: {name}", placement, samples[name], each.unit, each.reference),
                    samples[each.reference],
                    more_is_better=each.more_is_better,
                    at_least=each.targets.get(name),
                )


def _once(each: Work, filesystem: Mounted, count: int, cpu: int) -> float:
    return each.convert(work(each.what, filesystem.path, count, cpu), count)


def _each_of(what: str, filesystem: Mounted, count: int, cpu: int) -> float:
    return _microseconds(work(what, filesystem.path, count, cpu), count)


def _share(run: Run) -> Iterator[Row]:
    """Measure what a one-page fallocate costs over a getattr that an ordinary pyfuse3 filesystem answers."""
    count = run.count(2000)
    with memfs(run, _SIZE) as ours, plain(run, "--attr-timeout", "0") as theirs:
        for placement, (client_cpu, daemon_cpu) in placements().items():
            ours.pin(daemon_cpu)
            theirs.pin(daemon_cpu)
            samples = measure(
                {
                    "fallocate": partial(_each_of, "fallocate", ours, count, client_cpu),
                    "getattr": partial(_each_of, "stat", theirs, count, client_cpu),
                },
                run.repetitions,
            )
            row = compare(
                "fallocate one page, the daemon's share", placement, samples["fallocate"], "us",
                "getattr of plain pyfuse3", samples["getattr"],
            )  # fmt: skip
            assert row.reference is not None
            met = row.median - row.reference <= _SHARE_TARGET
            yield replace(row, target=f"<= reference + {_SHARE_TARGET} us", met=met)


def _memory(run: Run) -> Row:
    """Measure the resident memory of the daemon with many files, without their content."""
    count = run.count(_FILES)
    cpu = next(iter(placements().values()))[0]
    with memfs(run, _SIZE) as ours, plain(run) as theirs:
        for mounted in (ours, theirs):
            work("populate", mounted.path, count, cpu)
        row = compare(
            f"memory of the daemon, {count:,} files", "-", Sample([ours.memory]), "MiB", PLAIN, Sample([theirs.memory])
        )
    if count < _FILES:
        return row
    return replace(row, target=f"<= {_MEMORY_TARGET} MiB", met=row.median <= _MEMORY_TARGET)
