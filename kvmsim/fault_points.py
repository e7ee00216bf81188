"""The steps of kvmsim that tests can make fail, wait or die (memfs/contract/faults.py)."""

from __future__ import annotations

from typing import Final

from memfs.contract.faults import Step, install
from memfs.contract.protocol.fault_points import STEPS_OF_PEERS, after_notification, before_notification

STEPS: Final = {
    **STEPS_OF_PEERS,
    "kvmsim.backing:Backing.act": Step(before_notification, after_notification),
}


def install_faults() -> None:
    """Make it possible to inject faults, if the environment asks for that (MEMFS_INJECT)."""
    install(STEPS)
