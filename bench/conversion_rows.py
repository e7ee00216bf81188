"""Conversions, through the mount, with an owner that must act on them; and faults of the secondary MMU.

Three take part in a conversion: the program that calls fallocate (C, so that no Python of it is measured), the daemon,
and the owner, which is notified and unmaps. The first shares a CPU with the owner or with both. The kernel's own part
is measured on a plain tmpfs with the same calls, and what processes cannot help is a message and its answer between two
Python processes.

Faults stand beside userfaultfd(2), with which a VMM gives memory page by page today: those on memory that is there
should be ten times as many. Those on absent memory cannot be, on one CPU: there raw fallocate is only eight times it,
and nobody maps pages faster than the kernel makes them. So their reference is fallocate where they come in order.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from bench import uffd
from bench.harness import (
    BenchError,
    Row,
    Run,
    Sample,
    alone,
    compare,
    helper,
    measure,
    memfs,
    now,
    pin,
    placements,
    tmpfs,
    work,
)
from bench.owner import add_slot, make_files
from kvmsim.mmu.page_fault import Access
from kvmsim.side import Side
from kvmsim.vm import VM, create_vm
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange

_SIZE: Final = "size=4g,nr_inodes=100k"
_GIB: Final = 1 << 18  # pages
_MANY: Final = 1000
_VMS_OF_A_PROCESS: Final = 500  # each slot takes six descriptors of it
_ECHOES: Final = 3000


def rows(run: Run) -> Iterator[Row]:
    """All rows about conversions and faults."""
    for name, group in {
        "convert": _conversions,
        "faults": _faults,
        "many VMs": _many_vms,
    }.items():
        if run.wants(name):
            yield from group(run)


def owner(
    root: Path, vms: int, slots: int, pages: int, first: int = 0
) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run a process with VMs on a memfs (owner.py). Raises BenchError."""
    return helper("bench.owner", root, vms, slots, pages, first)


# -- conversions ----------------------------------------------------------------------------------------------------


def _conversions(run: Run) -> Iterator[Row]:
    with memfs(run, _SIZE) as ours, tmpfs(run, _SIZE) as theirs, owner(ours.path, 1, 1, _GIB) as process:
        for name in ("shared", "private"):
            (theirs.path / name).touch()
        for placement, (client_cpu, daemon_cpu) in placements().items():
            ours.pin(daemon_cpu)
            pin(process, client_cpu)
            yield from _conversions_at(run, placement, ours.path, theirs.path, client_cpu, daemon_cpu)


def _conversions_at(run: Run, placement: str, ours: Path, theirs: Path, cpu: int, daemon_cpu: int) -> Iterator[Row]:
    def there_and_back(directory: Path, pages: int, count: int) -> float:
        """Microseconds for one conversion, of two."""
        return work(f"convert:{pages}", directory, count, cpu) / count / 2e3

    big = measure(
        {
            "memfs": lambda: 2 * there_and_back(ours, _GIB, 1) / 1e3,
            "tmpfs": lambda: 2 * there_and_back(theirs, _GIB, 1) / 1e3,
        },
        max(3, run.repetitions // 2),
    )
    yield compare(
        *("convert 1 GiB there and back", placement, big["memfs"], "ms", "tmpfs, the same calls"),
        big["tmpfs"],
        at_least=0.8,
    )
    count = run.count(800)
    small = measure(
        {
            "page": lambda: there_and_back(ours, 1, count),
            "page on tmpfs": lambda: there_and_back(theirs, 1, count),
            "huge": lambda: there_and_back(ours, 512, count // 8),
            "huge on tmpfs": lambda: there_and_back(theirs, 512, count // 8),
            "echo": lambda: _echo(cpu, daemon_cpu),
        },
        run.repetitions,
    )
    yield compare(
        *("convert a page", placement, small["page"], "us", "a message and its answer in Python"),
        small["echo"],
        at_least=0.1,
    )
    kernel = small["huge on tmpfs"].median - small["page on tmpfs"].median
    yield compare(
        *("convert 2 MiB", placement, small["huge"], "us", "1.5 x a page + the kernel's part"),
        Sample([1.5 * small["page"].median + kernel]),
        at_least=1,
    )


def _echo(cpu: int, other_cpu: int) -> float:
    """Microseconds for a small message and its answer, between two Python processes that do nothing else."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {other_cpu})
        here.close()
        while data := there.recv(64):
            there.send(data)
        os._exit(0)
    there.close()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    started = now()
    for _ in range(_ECHOES):
        here.send(b"x" * 40)
        here.recv(64)
    taken = now() - started
    here.close()
    os.waitpid(child, 0)
    os.sched_setaffinity(0, before)
    return taken / _ECHOES * 1e6


# -- faults ---------------------------------------------------------------------------------------------------------


def _faults(run: Run) -> Iterator[Row]:
    with memfs(run, _SIZE) as mounted, tmpfs(run, _SIZE) as theirs:
        for placement, (cpu, daemon_cpu) in placements().items():
            mounted.pin(daemon_cpu)
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {cpu})
            try:
                found = trio.run(_fault_samples, run, mounted.path, theirs.path, f"{cpu}-{daemon_cpu}")
                userfaultfd = Sample([uffd.pages_per_second(4096, daemon_cpu) for _ in range(run.repetitions)])
            except uffd.Unavailable as error:
                raise BenchError(str(error)) from error
            finally:
                os.sched_setaffinity(0, before)
            against = "userfaultfd, served by a process"
            yield alone(f"faults of {against}", placement, userfaultfd, "pages/s")
            for name, target in (("whole", 10e6), ("every other page", 10e6)):
                sample = found[name]
                row = compare(
                    *(f"faults on allocated private pages at random, {name}", placement, sample, "pages/s", against),
                    userfaultfd,
                    more_is_better=True,
                )
                assert row.ratio is not None
                met = sample.median >= target and row.ratio >= 10
                yield replace(row, target=f">= {target / 1e6:g} M/s, ratio >= 10", met=met)
            yield compare(
                *("faults on absent shared pages in order", placement, found["in order"], "pages/s", "raw fallocate"),
                found["fallocate"],
                more_is_better=True,
                at_least=0.5,
            )
            sample = found["at random"]
            row = compare(
                *("faults on absent shared pages at random", placement, sample, "pages/s", against),
                userfaultfd,
                more_is_better=True,
            )
            yield replace(row, target=">= 100 k/s", met=sample.median >= 1e5)


async def _fault_samples(run: Run, ours: Path, theirs: Path, name: str) -> dict[str, Sample]:
    """Measure how many pages are mapped a second, by kind of fault."""
    socket_path = (await trio.to_thread.run_sync(os.getxattr, ours, "user.memfs.socket")).decode()
    pages = _GIB // (8 if run.quick else 4)
    values: dict[str, list[float]] = {}
    order = np.random.default_rng(0).permutation(pages)
    async with create_vm(socket_path, map_on_fallocate=False) as vm:
        files = [await trio.to_thread.run_sync(make_files, ours / f"{name}-{number}", pages) for number in range(3)]
        for number, pair in enumerate(files):
            await trio.to_thread.run_sync(_prepare, pair, number, pages)
            await add_slot(vm, number, pair, pages)
            if number < 2:
                assert await vm.fault(Access(Gfn(number * pages), write=False, side=Side.PRIVATE)) is None
        for repetition in range(run.repetitions + 1):
            found = {
                "whole": _private(vm, order, pages),
                "every other page": _private(vm, order[order % 2 == 0] + pages, pages // 2),
                "in order": await _shared(vm, ours / f"{name}-2", np.arange(2 * pages, 3 * pages), 4096),
                "at random": await _shared(vm, ours / f"{name}-2", order + 2 * pages, 4096),
                "fallocate": await trio.to_thread.run_sync(_raw, theirs / "raw", pages),
            }
            for kind, value in found.items() if repetition else ():
                values.setdefault(kind, []).append(value)
    await trio.to_thread.run_sync(_remove, ours, name)
    return {kind: Sample(each) for kind, each in values.items()}


def _remove(directory: Path, name: str) -> None:
    """Remove files, which take memory until nobody has them."""
    for path in directory.glob(f"{name}-*"):
        shutil.rmtree(path)


def _prepare(files: tuple[int, int], number: int, pages: int) -> None:
    """All pages private, every other page, none; and of the first two no shared memory, which would only take room."""
    shared, private = files
    if number < 2:
        fallocate(shared, 3, 0, pages * PAGE_SIZE)
    if number == 0:
        fallocate(private, 0, 0, pages * PAGE_SIZE)
    elif number == 1:
        for page in range(0, pages, 2):
            fallocate(private, 0, page * PAGE_SIZE, PAGE_SIZE)


def _private(vm: VM, gfns: np.ndarray[Any, np.dtype[np.int64]], expected: int, batch: int = 1 << 15) -> float:
    vm.mmu.unmap(GfnRange(Gfn(0), Gfn(1 << 24)))
    started = now()
    mapped = sum(int(np.count_nonzero(vm.fault_in(gfns[at : at + batch]))) for at in range(0, len(gfns), batch))
    taken = now() - started
    assert mapped == expected, f"{mapped} of {expected} pages are mapped"
    return mapped / taken


async def _shared(vm: VM, files: Path, gfns: np.ndarray[Any, np.dtype[np.int64]], batch: int) -> float:
    """Measure batches of faults on a file without pages; the punch unmaps those of the batch before."""
    await trio.to_thread.run_sync(_empty, files / "shared", len(gfns))
    started = now()
    for at in range(0, len(gfns), batch):
        served = await vm.fault_in_shared(gfns[at : at + batch], write=True)
        assert served.all()
    return len(gfns) / (now() - started)


def _empty(path: Path, pages: int) -> None:
    fd = os.open(path, os.O_RDWR)
    fallocate(fd, 3, 0, pages * PAGE_SIZE)
    os.close(fd)


def _raw(path: Path, pages: int) -> float:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    started = now()
    fallocate(fd, 0, 0, pages * PAGE_SIZE)
    taken = now() - started
    os.close(fd)
    path.unlink()
    return pages / taken


# -- many VMs -------------------------------------------------------------------------------------------------------


def _many_vms(run: Run) -> Iterator[Row]:
    """Measure as many conversions by a thousand VMs as by one, and how long the slowest took."""
    vms = _MANY // (8 if run.quick else 1)
    with memfs(run, f"{_SIZE}") as mounted:
        for placement, (cpu, daemon_cpu) in placements().items():
            mounted.pin(daemon_cpu)
            samples: dict[int, list[float]] = {1: [], vms: []}
            longest = 0.0
            for number in (1, vms):
                root = mounted.path / f"{placement.replace(' ', '-')}-{number}"
                root.mkdir()
                with contextlib.ExitStack() as owners:
                    for first in range(0, number, _VMS_OF_A_PROCESS):
                        in_it = min(_VMS_OF_A_PROCESS, number - first)
                        pin(owners.enter_context(owner(root, in_it, 4, 16, first)), cpu)
                    _convert_everywhere(root, number, vms * 4)  # does not count
                    for _ in range(run.repetitions):
                        rate, waited = _convert_everywhere(root, number, vms * 4)
                        samples[number].append(rate)
                        longest = max(longest, waited if number == vms else 0)
                shutil.rmtree(root)  # the daemon keeps descriptors of page maps
            yield compare(
                *(f"conversions by {vms} VMs with 4 slots each", placement, Sample(samples[vms]), "a second"),
                *("by one VM", Sample(samples[1])),
                more_is_better=True,
                at_least=0.8,
            )
            yield alone(f"longest wait of {vms} VMs", placement, Sample([longest * 1e3]), "ms")


def _convert_everywhere(root: Path, vms: int, conversions: int) -> tuple[float, float]:
    """Convert a page in slot after slot of VM after VM, from four threads. How many a second, and the longest, in s."""
    slots = [root / f"{vm}-{slot}" for slot in range(4) for vm in range(vms)]
    work_of: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    for number, directory in enumerate(slots):
        files = os.open(directory / "shared", os.O_RDWR), os.open(directory / "private", os.O_RDWR)
        work_of[number % 4].append(files)
    waits: list[float] = []

    def convert(mine: list[tuple[int, int]], count: int) -> None:
        for turn in range(count):
            shared, private = mine[turn % len(mine)]
            at = turn // len(mine) % 16 * PAGE_SIZE
            started = now()
            fallocate(private, 0, at, PAGE_SIZE)
            fallocate(shared, 3, at, PAGE_SIZE)
            fallocate(private, 3, at, PAGE_SIZE)
            waits.append(now() - started)

    threads = [threading.Thread(target=convert, args=(mine, conversions // 4)) for mine in work_of]
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
    return conversions / taken, max(waits)
