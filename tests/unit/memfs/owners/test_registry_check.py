"""Registry.check raises on each invariant that is broken, whichever registration breaks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memfs.owners.registration import Registration
from memfs.owners.registry import Registry
from memfs.store.file import File
from memfs.tree.tree import ROOT_INO, Tree

from .test_registry import Guest, empty, registry, tree

__all__ = ["registry", "tree"]  # fixtures


def _end(registration: Registration) -> None:
    registration.alive = False


def _uncount(registration: Registration) -> None:
    registration.count = 0


def _unbind(registration: Registration) -> None:
    File.unbind(registration.file)


def _release(registration: Registration) -> None:
    registration.inode.holds = 0


def _forget(registration: Registration) -> None:
    del registration.owner.registrations[registration.id]


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (_end, "has ended"),
        (_uncount, "is counted 0 times"),
        (_unbind, "is not the file's owner"),
        (_release, "does not hold its inode"),
        (_forget, "registrations of owners that have ended"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
async def test_it_is_noticed(
    registry: Registry, tree: Tree, breaks: Callable[[Registration], None], says: str, which: int
) -> None:
    registrations = [Guest(registry).register(await empty(tree, name)) for name in ("a", "b")]
    registry.check()
    broken = registrations[which]
    holds, owner = broken.inode.holds, broken.file.owner
    breaks(broken)
    with pytest.raises(AssertionError, match=says):
        registry.check()
    broken.alive, broken.count, broken.inode.holds = True, 1, holds
    broken.owner.registrations[broken.id] = broken
    if broken.file.owner is not owner:
        broken.file.bind(broken)
    registry.check()
    for each in registrations:
        registry.end(each.owner)
    for name in (b"a", b"b"):
        tree.unlink(ROOT_INO, name)
