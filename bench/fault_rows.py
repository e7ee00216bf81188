"""What a guest's own accesses cost in kvmsim: the shipped trace over two files of a memfs, again and again.

Resident: after the first pass nothing faults, so neither the daemon nor the VMM has anything to do with it. Beside it
the same engine when it makes one access at a time, which is what it does with accesses that miss. The first pass is the
one in which memory is faulted in and converted, and in which blocks are prepared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import trio

from bench.harness import Row, Run, Sample, memfs, now
from kvmsim.engines.trace import TraceEngine
from kvmsim.engines.trace_file import Trace
from kvmsim.vcpu import VCPU
from kvmsim.vm import create_vm
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange

_TARGET: Final = 20.0  # million accesses a second
_SECONDS: Final = 2.0  # for each measurement, the first pass included
_SEAL: Final = "user.memfs.seals"


def rows(run: Run) -> Iterator[Row]:
    """All rows about traces."""
    if run.wants("trace replay"):
        trace = Trace.load(Path(str(files("kvmsim") / "traces" / "sort.npz")))
        with memfs(run, "size=64m") as mounted:
            shared, private = (mounted.path / name for name in ("shared", "private"))
            shared.touch()
            os.close(os.open(private, os.O_CREAT | os.O_RDWR, 0o600))
            os.setxattr(private, _SEAL, b"guest")
            with open_memory(str(shared), str(private), trace.memory_size) as vmm:
                yield from trio.run(_replay, run, vmm, f"{mounted.path}.sock", trace)


class _OneAtATime(TraceEngine):
    """The reference: never a block as a whole."""

    def _hits_ahead(self, *_: Any) -> int:
        return 0

    def _run_whole(self, *_: Any) -> bool:
        return False


async def _rates(vmm: Vmm, vcpu: VCPU, engine: TraceEngine) -> tuple[float, float]:
    """Measure million accesses a second in the first pass, and in those after it."""
    started = now()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vmm.run, vcpu)
        while not engine.passes:  # noqa: ASYNC110 - an engine that set events would be another one
            await trio.sleep(0.001)
        after_first, accesses = now(), engine.accesses
    return accesses / (after_first - started) / 1e6, (engine.accesses - accesses) / (now() - after_first) / 1e6


async def _replay(run: Run, vmm: Vmm, socket: str, trace: Trace) -> list[Row]:
    half = [GfnRange(Gfn(0), Gfn(trace.memory_size // PAGE_SIZE // 2))]
    async with create_vm(socket) as vm:
        await vmm.add_memory(vm)
        rates: dict[str, list[float]] = {"first": [], "blocks": [], "singly": []}
        for repetition in range(run.repetitions + 1):
            for number, (name, kind) in enumerate((("blocks", TraceEngine), ("singly", _OneAtATime))):
                vm.mmu.unmap(vm.mmu.table.everything)
                engine = kind(vm, trace, half, repeat_for=_SECONDS)
                vcpu = vm.create_vcpu(2 * repetition + number, engine)
                first, rest = await _rates(vmm, vcpu, engine)
                if repetition:  # the first does not count: its memory is converted page by page
                    rates[name].append(rest)
                    if kind is TraceEngine:
                        rates["first"].append(first)
                vm.listeners.clear()
    samples = {name: Sample(values) for name, values in rates.items()}
    reference = samples["singly"].median
    found = []
    for name, which, target in (
        ("trace replay, resident", "blocks", _TARGET),
        ("trace replay, first pass", "first", None),
    ):
        sample = samples[which]
        found.append(
            Row(
                *(name, "in process", sample.median, min(sample.values), max(sample.values), "M accesses/s"),
                *("one at a time", reference, sample.median / reference),
                target=None if target is None else f">= {target:g} M/s",
                met=None if target is None else sample.median >= target,
            )
        )
    return found
