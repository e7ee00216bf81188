"""A block of a trace, prepared to be run as a whole: what of it matters once it is known that nothing in it misses.

Between two checkpoints of the event loop nothing but the guest's own accesses happens to its memory. So of all accesses
of a block to one byte only these are of consequence: that it is loaded at all, since then it must be what was stored
there last; and the last store, since that is what remains. Which bytes these are is the trace's alone, and is computed
once (`Plan.make`); where they lie in host memory depends on translations, and is computed again when the TLB has
changed (`Plan.place`); what is stored depends on how many stores came before. A pass over a block that has been placed
is a few array operations over the bytes that it uses.

What is compared is compared twice, before the stores and after. If either differs, or something misses, then the
block's effects are undone and `run` returns False; an engine that then makes its accesses one at a time sees which it
was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmsim.mmu.tlb import TlbEntry
from kvmsim.side import Side
from kvmsim.slots.hva import LocalMemory
from memfs.contract.units import PAGE_SHIFT, PAGE_SIZE, Gfn, offset_in_page

MIXER: Final = 0x9E3779B97F4A7C15  # odd, so that no two stores within 2**64 write the same 8 bytes
MASK: Final = (1 << 64) - 1

Indexes = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def stored_value(number: int, size: int) -> bytes:
    """Return what the store with a number writes: 8 bytes that no other store writes, repeated or cut to its size."""
    eight = (number * MIXER & MASK).to_bytes(8, "little")
    return eight[:size] if size <= 8 else (eight * (size // 8 + 1))[:size]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Bytes that are stored: `gpas`; byte `shift` / 8 of (`mixed` + what the block's first store begins with)."""

    gpas: Indexes
    mixed: npt.NDArray[np.uint64]
    shift: npt.NDArray[np.uint64]

    def where(self, chosen: npt.NDArray[np.bool_]) -> _Stored:
        return _Stored(self.gpas[chosen], self.mixed[chosen], self.shift[chosen])

    def values(self, before: int) -> Bytes:
        values: Bytes = ((self.mixed + np.uint64(before * MIXER & MASK)) >> self.shift).astype(np.uint8)
        return values


@dataclass(frozen=True, slots=True)
class _Placed:
    """The part of a plan that lies in one mapping of host memory, on one side."""

    memory: Bytes
    shadow: Bytes
    loaded: Indexes  # in memory; and in the shadow:
    loaded_gpas: Indexes
    stored_at: Indexes
    stored: _Stored

    def is_as_expected(self) -> bool:
        return bool((self.memory[self.loaded] == self.shadow[self.loaded_gpas]).all())


class Plan:
    """Accesses [start, end) of a trace. Use `make`."""

    def __init__(self, pages: Sequence[tuple[Gfn, bool]], accesses: int, stores: int, loaded: Indexes, stored: _Stored):
        self.pages: Final = pages  #: gfns, each once, and whether any access to it is a store
        self.accesses: Final = accesses
        self.stores: Final = stores
        self._loaded: Final = loaded
        self._stored: Final = stored
        self._placed: list[_Placed] = []
        self._placed_at = -1  # the version of the TLB

    @classmethod
    def make(cls, gpas: Indexes, sizes: Indexes, writes: npt.NDArray[np.bool_]) -> Plan:
        """Prepare accesses: gpas, sizes in bytes, and which are stores; shape (n,), n > 0; none crosses a page."""
        gfns = gpas >> PAGE_SHIFT
        low = int(gfns.min())
        kind = np.zeros(int(gfns.max()) - low + 1, np.uint8)  # 1: used, 3: and stored to
        kind[gfns - low] = 1
        kind[gfns[writes] - low] = 3
        used = np.flatnonzero(kind)
        order = np.zeros(len(kind), np.int64)  # of a page among those that are used
        order[used] = np.arange(len(used))
        dense = order[gfns - low] * PAGE_SIZE + offset_in_page(gpas)  # type: ignore[arg-type]
        latest = np.zeros(len(used) * PAGE_SIZE, np.int32)  # access to each byte, and 0: none

        _, loaded, _ = _expand(dense[~writes], sizes[~writes])
        loaded = loaded[_last_of_each(loaded, latest)]
        latest[loaded] = 0
        owner, stored, within = _expand(dense[writes], sizes[writes])
        last = _last_of_each(stored, latest)
        pages = (used + low) << PAGE_SHIFT

        def gpas_of(places: Indexes) -> Indexes:
            found: Indexes = pages[places >> PAGE_SHIFT] + (places & (PAGE_SIZE - 1))
            return found

        return cls(
            [(Gfn(gfn + low), bool(kind[gfn] == 3)) for gfn in used.tolist()],
            len(gpas),
            int(np.count_nonzero(writes)),
            gpas_of(loaded),
            _Stored(
                gpas_of(stored[last]),
                (owner[last] + 1).astype(np.uint64) * np.uint64(MIXER),
                (within[last] % 8 * 8).astype(np.uint64),
            ),
        )

    @property
    def nbytes(self) -> int:
        """About how many bytes of memory it takes, placed."""
        return 200 + 150 * len(self.pages) + 24 * len(self._loaded) + 48 * len(self._stored.gpas)

    def is_placed(self, version: int) -> bool:
        """Return whether it was placed at that version of the TLB."""
        return self._placed_at == version

    def place(self, version: int, translations: Sequence[TlbEntry], shadows: dict[Side, Bytes]) -> None:
        """Compute where its bytes are, given the translations of its `pages`."""
        keys = [(id(each.memory), each.side) for each in translations]
        groups = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        first = self.pages[0][0]
        span = self.pages[-1][0] - first + 1
        shift, group = np.zeros(span, np.int64), np.zeros(span, np.int64)
        for (gfn, _), each, key in zip(self.pages, translations, keys, strict=True):
            shift[gfn - first] = each.offset - (gfn << PAGE_SHIFT)
            group[gfn - first] = groups[key]
        memories = {key: each.memory for key, each in zip(keys, translations, strict=True)}
        loaded_page, stored_page = (self._loaded >> PAGE_SHIFT) - first, (self._stored.gpas >> PAGE_SHIFT) - first
        self._placed = []
        for key, number in groups.items():
            memory = memories[key]
            assert not isinstance(memory, LocalMemory), "not an array"
            loads, stores = group[loaded_page] == number, group[stored_page] == number
            stored = self._stored.where(stores)
            self._placed.append(
                _Placed(
                    np.frombuffer(memory, np.uint8),
                    shadows[key[1]],
                    self._loaded[loads] + shift[loaded_page[loads]],
                    self._loaded[loads],
                    stored.gpas + shift[stored_page[stores]],
                    stored,
                )
            )
        self._placed_at = version

    def run(self, before: int) -> bool:
        """Make all its accesses, after `before` stores. Returns False, changing nothing, if a load would be wrong."""
        if not all(placed.is_as_expected() for placed in self._placed):
            return False
        undo = [_store(placed, before) for placed in self._placed if len(placed.stored_at)]
        if undo and not all(placed.is_as_expected() for placed in self._placed):
            for step in reversed(undo):
                step()
            return False
        return True

    def forget(self) -> None:
        """Drop its references to host memory."""
        self._placed, self._placed_at = [], -1


def _store(placed: _Placed, before: int) -> Callable[[], None]:
    """Write what is stored, to memory and shadow. Returns what undoes it."""
    gpas, values = placed.stored.gpas, placed.stored.values(before)
    memory, shadow = placed.memory[placed.stored_at], placed.shadow[gpas]
    placed.memory[placed.stored_at] = values
    placed.shadow[gpas] = values

    def undo() -> None:
        placed.memory[placed.stored_at] = memory
        placed.shadow[gpas] = shadow

    return undo


def _expand(places: Indexes, sizes: Indexes) -> tuple[Indexes, Indexes, Indexes]:
    """Return the bytes of accesses, in order: the access that each belongs to, its place, and its number there."""
    owner = np.repeat(np.arange(len(places)), sizes)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return owner, places[owner] + within, within


def _last_of_each(places: Indexes, latest: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Return which elements are the last of their value; `latest` has a 0 for each value, and not afterwards."""
    numbers = np.arange(1, len(places) + 1, dtype=np.int32)
    np.maximum.at(latest, places, numbers)  # where an index is repeated, an assignment need not leave the last value
    last: npt.NDArray[np.bool_] = latest[places] == numbers
    return last
