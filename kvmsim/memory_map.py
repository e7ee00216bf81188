"""A small picture of guest memory: which pages are private, shared or absent."""

from __future__ import annotations

from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.vm import VM
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange

PRIVATE, SHARED, ABSENT, MIXED = "█", "░", "·", "▒"
_ASCII = str.maketrans({PRIVATE: "#", SHARED: "-", ABSENT: ".", MIXED: "+"})
_COLUMNS = 64
_MAX_ROWS = 16


def state_of(vm: VM, slot: Memslot, gfn: Gfn) -> str:
    """Return PRIVATE if allocated in the private file, else SHARED if mapped, else ABSENT."""
    if slot.side(gfn) is Side.PRIVATE:
        return PRIVATE
    return SHARED if vm.mmu.table.lookup(gfn) else ABSENT


def draw(vm: VM, gfns: GfnRange, *, ascii_only: bool = False) -> str:
    """Return guest memory as rows of characters, one a page or one a group of pages if there are many.

    `ascii_only`: for a terminal that has no other characters.
    """
    group = -(-len(gfns) // (_COLUMNS * _MAX_ROWS))
    cells = []
    for start in range(gfns.start, gfns.end, group):
        states = {_state(vm, Gfn(gfn)) for gfn in range(start, min(start + group, gfns.end))}
        cells.append(states.pop() if len(states) == 1 else MIXED)
    rows = ["".join(cells[at : at + _COLUMNS]) for at in range(0, len(cells), _COLUMNS)]
    legend = f"{PRIVATE} private  {SHARED} shared  {ABSENT} absent" + (f"  {MIXED} mixed" if group > 1 else "")
    text = "\n".join([*(f"  {row}" for row in rows), f"  {legend}; one character is {group * PAGE_SIZE >> 10} KiB"])
    return text.translate(_ASCII) if ascii_only else text


def _state(vm: VM, gfn: Gfn) -> str:
    slot = vm.mmu.slots.find(gfn)
    return ABSENT if slot is None else state_of(vm, slot, gfn)
