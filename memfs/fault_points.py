"""The steps of memfs that tests can make fail, wait or die (contract/faults.py)."""

from __future__ import annotations

from typing import Final

from memfs.contract.faults import Point, Step, install
from memfs.contract.protocol.fault_points import STEPS_OF_PEERS, after_notification, before_notification

STEPS: Final = {
    **STEPS_OF_PEERS,
    "memfs.owners.owner:Owner._post": Step(before_notification),
    "memfs.owners.owner:Owner._ack": Step(after_notification),
    "memfs.store.pages:Pages._allocate_chunk": Step((Point.BEFORE_ALLOCATE,), (Point.AFTER_ACCOUNT,)),
    "memfs.store.pages:Pages._free": Step((Point.BEFORE_FREE,), (Point.AFTER_ACCOUNT,)),
    "memfs.store.conversion:_Conversion._allocate": Step((Point.BEFORE_ALLOCATE,)),
    "memfs.store.conversion:_Conversion._free": Step((Point.BEFORE_FREE,), (Point.AFTER_ACCOUNT,)),
    # The pages are there, or are gone, so that is accounted for in any case.
    "memfs.store.pages:Pages._account_allocated": Step((Point.AFTER_ALLOCATE, Point.BEFORE_ACCOUNT), always=True),
    "memfs.store.pages:Pages._account_freed": Step((Point.AFTER_FREE, Point.BEFORE_ACCOUNT), always=True),
    "memfs.store.conversion:_Conversion._account_allocated": Step((Point.AFTER_ALLOCATE,), always=True),
    "memfs.store.conversion:_Conversion._account_freed": Step((Point.AFTER_FREE, Point.BEFORE_ACCOUNT), always=True),
    "memfs.state.journal:LogJournal.commit": Step((Point.BEFORE_COMMIT,), (Point.AFTER_COMMIT,)),
}


def install_faults() -> None:
    """Make it possible to inject faults, if the environment asks for that (MEMFS_INJECT)."""
    install(STEPS)
