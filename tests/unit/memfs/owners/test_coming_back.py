"""What is written down of owners that have ended, or of what cannot come back, does not stay written down."""

from __future__ import annotations

import resource
import stat
from collections.abc import Iterator

import pytest

from memfs.contract.protocol.connection import RequestId
from memfs.contract.protocol.messages import Done
from memfs.owners.registration import Registration
from memfs.owners.registry import Registry
from memfs.state.journal import Committed
from memfs.store.tmpfs_backing import TmpfsBacking
from memfs.tree.inode import RegularFile
from memfs.tree.rebuild import keys_of
from memfs.tree.tree import ROOT_INO
from tests.helpers import not_none, one

from ..tree.test_rebuild import World, new_backing_of_state, successor
from .test_registry import Guest

SEPARATE = 100  # ranges, of which more keys are written than one commit drops


@pytest.fixture
def backing() -> Iterator[TmpfsBacking]:
    backing = new_backing_of_state()
    yield backing
    backing.close()


class Mount:
    """A world with owners."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.state: Committed = world.journal.load()
        self.registry = Registry(world.tree, journal=world.journal)

    def registered(self) -> Registration:
        """A registration of a new file by a new owner."""
        guest = Guest(self.registry)
        guest.user = 0
        self.registry.coming_back.greet(guest)
        inode = self.world.tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0)
        assert isinstance(inode, RegularFile)
        return guest.register(inode)

    def die(self) -> Mount:
        """Be killed; return the next one, which has all that was committed."""
        after = Mount(successor(self.world))
        after.registry.coming_back.restore(after.state)
        return after

    def check(self) -> None:
        """Check owners, and that nothing else is written down than what there is."""
        self.world.journal.commit()
        self.registry.check()
        self.world.journal.check(keys_of(self.world.tree) | self.registry.coming_back.keys)

    def close(self) -> None:
        for owner in list(self.registry.owners.values()):
            self.registry.end(owner)
        self.world.close()


def test_killed_before_all_that_an_owner_had_is_forgotten(backing: TmpfsBacking) -> None:
    before = Mount(World(backing))
    registration = before.registered()
    registration.locks.lock(*(one(2 * number) for number in range(SEPARATE)))
    registration.frames.pfn(one(0).start)
    not_none(registration.owner.last_answers).add(RequestId(1), Done())
    before.world.journal.commit()
    before.registry.end(registration.owner)
    after = before.die()
    assert not after.registry.owners
    after.check()
    after.close()


def test_a_registration_that_cannot_come_back_is_none_for_those_that_follow(backing: TmpfsBacking) -> None:
    before = Mount(World(backing))
    registration = before.registered()
    registration.locks.lock(one(3))
    registration.frames.pfn(one(3).start)
    before.world.journal.commit()
    after = Mount(successor(before.world))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        after.registry.coming_back.restore(after.state)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(after.registry.owners) == 1
    assert not after.registry.registrations
    assert after.registry.frames.allocated == 0
    after.check()
    after.registry.end(next(iter(after.registry.owners.values())))
    last = after.die()
    assert not last.registry.registrations
    last.check()
    last.close()
