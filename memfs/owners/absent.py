"""An owner whose connection ended with a predecessor, until it comes back, or has not done so in time.

It has all that it had. Whatever would notify it waits for that: then it goes on with who came, or with nobody. So an
operation on its files waits where only its caller does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from memfs.contract.protocol.call import PeerGone
from memfs.contract.protocol.messages import Notification
from memfs.owners.owner import Answer, Owner, Unlocked

if TYPE_CHECKING:
    from memfs.owners.registry import Registry


class Absent(Owner):
    """An owner that has yet to come back."""

    def __init__(self, registry: Registry, number: int) -> None:
        super().__init__(registry, number)
        self._settled = trio.Event()
        self._successor: Owner | None = None

    @property
    def is_absent(self) -> bool:
        """Whether it has yet to come back."""
        return not self._settled.is_set()

    def settle(self, successor: Owner | None) -> None:
        """Note who has come back, or that nobody has. What waits for that goes on when others have had their turn."""
        self._successor = successor
        self._settled.set()

    async def settled(self) -> Owner | None:
        """Wait for that, and return who has come back. Cannot be cancelled: it is over soon."""
        with trio.CancelScope(shield=True):
            await self._settled.wait()
        return self._successor

    async def tell(self, message: Notification, ino: int | None = None, unlocked: Unlocked | None = None) -> None:
        """Notify who comes back. Never raises, and cannot be cancelled."""
        successor = await self.settled()
        if successor is not None:
            await successor.tell(message, ino, unlocked)

    # -- there is nobody to talk to ---------------------------------------------------------------------------------

    def notify(self, message: Notification) -> Answer:
        """Raise PeerGone."""
        raise PeerGone("it has not come back")

    async def cut_off(self, reason: str) -> None:
        """Do nothing."""

    def has_thread(self, number: int) -> bool:
        """Return False: its process is not known."""
        return False

    def is_stopped(self) -> bool:
        """Return False: its process is not known."""
        return False

    def is_dead(self) -> bool:
        """Return False: its process is not known."""
        return False
