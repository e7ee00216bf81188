"""How a VMM makes the call that converts memory. What the call answers is put in its mouth: there is no mount."""

from __future__ import annotations

import errno
from collections.abc import Iterable

import pytest

from kvmsim.side import Side
from kvmsim.vmm.vmm import Vmm
from memfs.contract.conversion import Key
from memfs.contract.units import PAGE_SIZE, Gpa, PageRange
from tests.helpers import one, raises

from .conftest import PAGES, NewVm, region


@pytest.mark.parametrize("ends", [None, errno.ENOSPC])
async def test_call_that_a_signal_ends_is_made_again(
    new_vm: NewVm, monkeypatch: pytest.MonkeyPatch, ends: int | None
) -> None:
    """A part may have been converted, and to ask for all of it again converts the rest."""
    asked: list[list[PageRange]] = []

    def convert(private: int, key: Key, ranges: Iterable[PageRange], *, to_private: bool) -> None:
        asked.append(list(ranges))
        if len(asked) < 3:
            raise InterruptedError(errno.EINTR, "a signal")
        if ends is not None:
            raise OSError(ends, "as told")

    monkeypatch.setattr("kvmsim.vmm.convert.convert", convert)
    monkeypatch.setattr("kvmsim.vmm.convert.key_of", lambda shared: Key(1))
    async with new_vm() as (vm, store):
        shared, private = store.file(), store.file(guest=True)
        await vm.set_user_memory_region(region(shared, private))
        vmm = Vmm(shared, private, PAGES * PAGE_SIZE)
        vmm.adopt(vm, 0)
        if ends is None:
            await vmm.convert(Gpa(PAGE_SIZE), PAGE_SIZE, Side.PRIVATE)
        else:
            with raises(ends):
                await vmm.convert(Gpa(PAGE_SIZE), PAGE_SIZE, Side.PRIVATE)
    assert asked == [[one(1)]] * 3
