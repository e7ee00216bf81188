"""A VM that memfs has cut off, and that misses its memory before it has read so: that is the reason, not the memory."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from kvmsim.backing import StoreGone
from kvmsim.engines.program import Load, Program, ProgramEngine, Store
from kvmsim.engines.trace import TraceEngine
from kvmsim.engines.trace_file import RECORD, Trace
from kvmsim.vm import VM
from memfs.contract.protocol.messages import Fenced
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, Gpa

from .conftest import PAGES, NewVm, ScriptedStore, region


def cut_off(store: ScriptedStore, fd: int) -> None:
    """Do what memfs does with an owner that does not answer. Nobody reads meanwhile, since this does not await."""
    assert store.peer is not None
    store.peer.post(Fenced(errno.ETIMEDOUT, "no answer"))
    fallocate(fd, PUNCH_HOLE, 0, PAGES * PAGE_SIZE)


async def test_program_that_misses_what_it_stored(new_vm: NewVm) -> None:
    def program() -> Program:
        yield Store(Gpa(PAGE_SIZE), b"there")
        cut_off(store, fd)
        assert (yield Load(Gpa(PAGE_SIZE), 5)) == b"there"

    async with new_vm() as (vm, store):
        fd = store.file()
        await vm.set_user_memory_region(region(fd))
        with pytest.raises(StoreGone, match="cut us off: no answer"):
            await vm.create_vcpu(0, ProgramEngine(program())).run()


async def test_trace_that_misses_what_it_stored(new_vm: NewVm, monkeypatch: pytest.MonkeyPatch) -> None:
    records = np.zeros(2, RECORD)
    records["gpa"], records["size"], records["write"] = PAGE_SIZE, 8, (True, False)

    def check_alive(self: VM) -> None:
        was_alive(self)
        if engine.accesses == 1:  # between the store and the load
            monkeypatch.undo()
            cut_off(store, fd)

    async with new_vm() as (vm, store):
        fd = store.file()
        await vm.set_user_memory_region(region(fd))
        engine = TraceEngine(vm, Trace(records, "test"), [], block=1)
        was_alive = VM.check_alive
        monkeypatch.setattr(VM, "check_alive", check_alive)
        with pytest.raises(StoreGone, match="cut us off: no answer"):
            await vm.create_vcpu(0, engine).run()
