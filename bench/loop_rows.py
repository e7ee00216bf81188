"""What a guest waits for when its memory is converted: touch, fault, exit, VMM, conversion, notification, and on again.

Beside each conversion by a guest stands the call alone (MEMFS_IOC_CONVERT), made by a program in C on the same files,
with the same process as their owner: what is more than that is KVM's, the VMM's and the guest's. A sweep shows what is
converted along with the page that was touched.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from bench.guest import PAGES
from bench.harness import Row, Run, alone, compare, helper, measure, memfs, pin, placements, work

_SIZE: Final = "size=256m"
_TARGET: Final = 1e5  # pages a second


def rows(run: Run) -> Iterator[Row]:
    """All rows about the loop."""
    if not run.wants("conversion by a guest"):
        return
    for placement, (cpu, daemon_cpu) in placements().items():
        with memfs(run, _SIZE) as mounted, helper("bench.guest", mounted.path) as guest:
            mounted.pin(daemon_cpu)
            pin(guest, cpu)
            yield from _rows_at(run, placement, mounted.path, guest, cpu)


def _rows_at(run: Run, placement: str, root: Path, guest: subprocess.Popen[str], cpu: int) -> Iterator[Row]:
    count = run.count(800)
    samples = measure(
        {
            "implicit": lambda: _ask(guest, f"implicit {count}") / count / 2 * 1e6,
            "explicit": lambda: _ask(guest, f"explicit {count}") / count / 2 * 1e6,
            "call": lambda: work("convert-once:1", root / "page", count, cpu) / count / 2e3,
            "sweep": lambda: PAGES / _ask(guest, "sweep"),
        },
        run.repetitions,
    )
    for kind, how in (("implicit", "by touching it"), ("explicit", "by hypercall")):
        name = f"conversion by a guest of a page, {how}"
        against = "the call alone, by a program in C"
        yield compare(name, placement, samples[kind], "us", against, samples["call"], at_least=0.5)
    row = alone("conversion by a guest that sweeps over 16 MiB, 64 KiB along", placement, samples["sweep"], "pages/s")
    yield replace(row, target=f">= {_TARGET / 1e3:g} k/s", met=row.median >= _TARGET)


def _ask(guest: subprocess.Popen[str], what: str) -> float:
    """Have the guest run. Returns how long it took, in seconds."""
    assert guest.stdin is not None
    assert guest.stdout is not None
    print(what, file=guest.stdin, flush=True)
    return float(guest.stdout.readline())
