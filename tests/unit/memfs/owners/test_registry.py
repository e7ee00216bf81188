"""Owners without sockets: who may own what, what waits for whom, and that nothing outlives its registration."""

from __future__ import annotations

import errno
import json
import logging
import stat
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.turns import SHARE, Turns
from memfs.contract.logs import working_on
from memfs.contract.page_map import PageMap
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.call import Incoming, PeerGone
from memfs.contract.protocol.connection import RequestId
from memfs.contract.protocol.messages import (
    Ack,
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    Notification,
    PfnReply,
)
from memfs.contract.units import PAGE_SHIFT, PAGE_SIZE, PageRange
from memfs.owners.owner import Answer, Owner
from memfs.owners.registration import Registration
from memfs.owners.registry import Registry
from memfs.store.conversion import convert
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST
from memfs.tree.inode import RegularFile
from memfs.tree.tree import ROOT_INO, Tree
from tests.helpers import at, one, pages, raises

MEMORY = 64  # pages


class GuestAnswer:
    """What comes of notifying a guest, at once if it may be."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.is_done = False
        self.reply: Incoming | None = None
        if guest.at_once and guest.answers.is_set():
            self.answer()

    def poll(self) -> None:
        pass

    async def wait(self) -> None:
        if not self.is_done:
            await self.guest.answers.wait()
            self.answer()

    def answer(self) -> None:
        if self.guest.dead:
            raise PeerGone
        self.is_done, self.reply = True, Incoming(RequestId(1), Ack(self.guest.errno), ())


class Guest(Owner):
    """An owner that writes down what it hears, answers when it may, and can die."""

    at_once = False  # whether it is not even waited for, if it may answer

    def __init__(self, registry: Registry) -> None:
        super().__init__(registry)
        self.registry = registry
        self.heard: list[Notification] = []
        self.reasons: list[str] = []
        self.answers = trio.Event()
        self.answers.set()
        self.dead = False
        self.errno = 0

    def notify(self, message: Notification) -> Answer:
        self.heard.append(message)
        return GuestAnswer(self)

    async def cut_off(self, reason: str) -> None:
        self.reasons.append(reason)

    def has_thread(self, number: int) -> bool:
        return number == 4711

    def is_stopped(self) -> bool:
        return False

    def is_dead(self) -> bool:
        return False

    def die(self) -> None:
        """As the server does when the connection ends."""
        self.dead = True
        self.answers.set()
        self.registry.end(self)

    def register(self, inode: RegularFile) -> Registration:
        return self.registry.register(self, inode)


@pytest.fixture(autouse=True, params=["later", "at once"])
def guests_answer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guest, "at_once", request.param == "at once")


@pytest.fixture
def tree() -> Iterator[Tree]:
    backing = MemfdBacking(MEMORY * PAGE_SIZE)
    tree = Tree(lambda ino, seals: File(backing, ino, seals, held=True), 100, 0o755, 0, 0)
    yield tree
    tree.check()
    for inode in list(tree.files()):
        assert inode.file.owner is None, "an owner was left behind"
    tree.close()
    assert backing.free_pages == MEMORY


@pytest.fixture
def registry(tree: Tree) -> Iterator[Registry]:
    registry = Registry(tree)
    yield registry
    for owner in list(registry.owners.values()):
        registry.end(owner)
    registry.check()
    assert registry.frames.allocated == 0


async def empty(tree: Tree, name: str) -> RegularFile:
    """An ordinary file."""
    inode = tree.create(ROOT_INO, name.encode(), stat.S_IFREG | 0o600, 0, 0)
    assert isinstance(inode, RegularFile)
    return inode


async def filled(tree: Tree, name: str = "file") -> RegularFile:
    """A guest-sealed file of 16 pages, all allocated."""
    inode = tree.create(ROOT_INO, name.encode(), stat.S_IFREG | 0o600, 0, 0, seals=F_SEAL_GUEST)
    assert isinstance(inode, RegularFile)
    await inode.file.allocate(at(0), at(16), keep_size=False)
    return inode


async def test_one_owner_as_often_as_it_likes(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    first, second = Guest(registry), Guest(registry)
    registration = first.register(inode)
    assert first.register(inode) is registration
    with pytest.raises(PermissionError):
        second.register(inode)
    assert (registration.count, inode.holds, second.registrations) == (2, 1, {})
    registry.check()
    registry.unregister(first, registration.id)
    registry.check()
    with pytest.raises(PermissionError):
        second.register(inode)
    registry.unregister(first, registration.id)
    registry.check()
    with raises(errno.EBADF):
        registry.unregister(first, registration.id)
    assert second.register(inode).id != registration.id, "ids are never reused"
    with raises(errno.EBADF):
        first.registration(registration.id)
    registry.check()


async def test_what_was_converted_while_it_was_asked_for_does_not_come_back(tree: Tree, registry: Registry) -> None:
    """The owner asked before it could know; the page would be paid for on both sides."""
    private = tree.create(ROOT_INO, b"private", stat.S_IFREG | 0o600, 0, 0, seals=F_SEAL_GUEST)
    shared, owner = await empty(tree, "shared"), Guest(registry)
    assert isinstance(private, RegularFile)
    for inode in (shared, private):
        await inode.file.truncate(at(16))
    registration, _ = owner.register(shared), owner.register(private)
    owner.answers = trio.Event()
    replies: list[PfnReply] = []

    async def ask() -> None:
        replies.append(await registration.get_pfn(pages(0, 8), alloc=True, lock=False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(convert, shared.file, private.file, PageRanges.of([one(3)]), to_private=True))
        await wait_all_tasks_blocked()
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        owner.answers.set()
    assert [run.pfn for run in replies[0].runs] == [None]
    assert (shared.file.pages, private.file.pages) == (0, 1)
    await ask()
    assert shared.file.pages == 8, "who asks now is told"
    await convert(shared.file, private.file, PageRanges.of([one(3)]), to_private=False)


async def test_an_owner_cannot_name_another_s_registration(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    first, second = Guest(registry), Guest(registry)
    registration = first.register(inode)
    with raises(errno.EBADF):
        registry.unregister(second, registration.id)
    assert (registration.alive, registration.count) == (True, 1)
    registry.check()


async def test_an_owner_that_has_ended_registers_nothing(tree: Tree, registry: Registry) -> None:
    """Its Register may have waited for the file while it was fenced."""
    inode = await filled(tree)
    guest = Guest(registry)
    guest.die()
    with raises(errno.ESHUTDOWN):
        guest.register(inode)
    assert (inode.file.owner, inode.holds) == (None, 0)
    registry.check()


async def test_unlinked_file_lives_until_it_is_unregistered(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    guest = Guest(registry)
    registration = guest.register(inode)
    tree.unlink(ROOT_INO, b"file")
    assert tree.inode(inode.ino) is inode
    registry.check()
    registry.unregister(guest, registration.id)
    with raises(errno.ESTALE):
        tree.inode(inode.ino)
    registry.check()


async def test_pages_go_when_they_are_acknowledged_and_unlocked(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    guest = Guest(registry)
    registration = guest.register(inode)
    await registration.get_pfn(pages(2, 6), alloc=False)
    await registration.get_pfn(pages(4, 5), alloc=False)
    guest.answers = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inode.file.punch, at(4), at(4))
        await wait_all_tasks_blocked()
        assert guest.heard == [InvalidateBegin(registration.id, pages(4, 8))]
        guest.answers.set()
        await wait_all_tasks_blocked()
        registration.put_pfn(pages(2, 6))
        await wait_all_tasks_blocked()
        assert inode.file.pages == 16, "page 4 is locked once more"
        registry.check()
        registration.put_pfn(pages(4, 5))
    assert inode.file.pages == 12
    assert guest.heard[1:] == [InvalidateEnd(registration.id, pages(4, 8))]


async def test_locks_elsewhere_hold_up_nothing(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    registration = Guest(registry).register(inode)
    await registration.get_pfn(pages(0, 4), alloc=False)
    await inode.file.punch(at(4), at(4))
    assert inode.file.pages == 12


async def test_frames_without_a_lock_hold_up_nothing(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    registration = Guest(registry).register(inode)
    locked = await registration.get_pfn(pages(0, 4), alloc=False)
    registration.put_pfn(pages(0, 4))
    assert await registration.get_pfn(pages(0, 4), alloc=False, lock=False) == locked
    assert len(registration.locks) == 0
    await inode.file.punch(at(0), at(4))
    assert inode.file.pages == 12


async def test_putting_what_is_not_locked_changes_nothing(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    registration = Guest(registry).register(inode)
    await registration.get_pfn(pages(2, 4), alloc=False)
    for wrong in (pages(1, 3), pages(3, 5), pages(8, 9), pages(0, 16)):
        with raises(errno.EINVAL):
            registration.put_pfn(wrong)
        assert len(registration.locks) == 2
    registration.put_pfn(pages(3, 4))
    registration.put_pfn(pages(2, 3))
    assert len(registration.locks) == 0


async def test_look_ups(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    registration = Guest(registry).register(inode)
    await inode.file.punch(at(2), at(2))
    reply = await registration.get_pfn(pages(1, 6), alloc=False)
    assert [(run.pages, run.pfn is None) for run in reply.runs] == [
        (pages(1, 2), False),
        (pages(2, 4), True),
        (pages(4, 6), False),
    ]
    assert len(registration.locks) == 3, "absent pages are not locked"
    present = [run for run in reply.runs if run.pfn is not None]
    assert present[1].pfn == (present[0].pfn or 0) + 3, "frames are as far apart as pages"
    reply = await registration.get_pfn(pages(0, 4), alloc=True)
    assert [run.pages for run in reply.runs] == [pages(0, 4)]
    assert inode.file.pages == 16
    before = len(registration.locks)
    with raises(errno.EINVAL):
        await registration.get_pfn(pages(15, 17), alloc=True)
    await inode.file.truncate(at(MEMORY + 1))
    with raises(errno.ENOSPC):
        await registration.get_pfn(pages(0, MEMORY + 1), alloc=True)
    assert (inode.file.pages, len(registration.locks)) == (16, before)


async def test_look_up_that_waited_while_the_registration_ended(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    registration = (guest := Guest(registry)).register(inode)
    async with trio.open_nursery() as nursery, inode.file.locked():

        async def look_up() -> None:
            with raises(errno.EBADF):
                await registration.get_pfn(pages(0, 1), alloc=True)

        nursery.start_soon(look_up)
        await wait_all_tasks_blocked()
        registry.unregister(guest, registration.id)
    assert len(registration.locks) == 0


@pytest.mark.parametrize("silent", ["to begin", "with locks"])
async def test_owner_that_does_not_answer_in_time_is_fenced(
    tree: Tree,
    registry: Registry,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    silent: str,
) -> None:
    inode, other = await filled(tree), await filled(tree, "other")
    guest, bystander = Guest(registry), Guest(registry)
    registration = guest.register(inode)
    theirs = bystander.register(other)
    if silent == "with locks":
        await registration.get_pfn(pages(0, 1), alloc=False)
    else:
        guest.answers = trio.Event()
    start = trio.current_time()
    await inode.file.punch(at(0), at(4))
    assert trio.current_time() - start == pytest.approx(registry.notify_timeout)
    assert inode.file.pages == 12
    assert guest.heard == [InvalidateBegin(registration.id, pages(0, 4))], "nothing is told to one who is cut off"
    said = {"with locks": "it answered, but its pages [0, 1) stayed locked for 5 s"}
    assert guest.reasons == [said.get(silent, "no answer within 5 s")]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert (registry.fenced, inode.file.owner, theirs.alive) == (1, None, True)
    registry.check()
    assert bystander.register(inode).id > theirs.id
    registry.check()


async def test_owner_that_may_wait_for_itself_is_told_so(
    tree: Tree, registry: Registry, autojump_clock: object
) -> None:
    """A file call in the very loop that should answer, or beside one that is slow: the reason says what is known."""
    inode = await filled(tree)
    guest = Guest(registry)
    guest.register(inode)
    guest.answers = trio.Event()
    with working_on(1, 4711):
        await inode.file.punch(at(0), at(4))
    assert guest.reasons == [
        "no answer within 5 s; the file call that waits for it is made by thread 4711 of its own process"
    ]
    other = Guest(registry)
    other.register(inode)
    other.answers = trio.Event()
    with working_on(2, 4712):
        await inode.file.punch(at(4), at(4))
    assert other.reasons == ["no answer within 5 s"]


async def test_owner_that_dies_between_begin_and_end_holds_up_nobody(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    guest = Guest(registry)
    registration = guest.register(inode)
    await registration.get_pfn(pages(0, 1), alloc=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inode.file.punch, at(0), at(4))
        await wait_all_tasks_blocked()
        assert inode.file.pages == 16
        guest.die()
    assert inode.file.pages == 12
    assert len(guest.heard) == 1
    registry.check()


async def test_who_is_telling_an_owner_cannot_be_interrupted(tree: Tree, registry: Registry) -> None:
    """Once the beginning has been told, the end must come, and the pages are as they were told to be."""
    inode = await filled(tree)
    guest = Guest(registry)
    registration = guest.register(inode)
    guest.answers, scope = trio.Event(), trio.CancelScope()

    async def punch() -> None:
        with scope:
            await inode.file.punch(at(0), at(4))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(punch)
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert guest.heard == [InvalidateBegin(registration.id, pages(0, 4))]
        guest.answers.set()
    assert guest.heard[1:] == [InvalidateEnd(registration.id, pages(0, 4))]
    assert (inode.file.pages, registration.alive, guest.reasons) == (12, True, [])


async def test_unregistering_during_a_punch_lets_it_go_on(tree: Tree, registry: Registry) -> None:
    inode = await filled(tree)
    guest, next_one = Guest(registry), Guest(registry)
    registration = guest.register(inode)
    await registration.get_pfn(pages(0, 1), alloc=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inode.file.punch, at(0), at(4))
        await wait_all_tasks_blocked()
        registry.unregister(guest, registration.id)
        next_one.register(inode)
        registry.check()
    assert inode.file.pages == 12
    over = pages(0, 4)
    assert guest.heard == [InvalidateBegin(registration.id, over), InvalidateEnd(registration.id, over)]
    assert next_one.heard == [], "what it did not hear begin it does not hear end"


async def test_what_an_owner_could_not_do_is_logged(
    tree: Tree, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    inode = await filled(tree)
    guest = Guest(registry)
    registration = guest.register(inode)
    guest.errno = errno.ENOMEM
    await inode.file.allocate(at(4), at(1), keep_size=True)
    assert guest.heard == [Fallocate(registration.id, pages(4, 5))]
    assert "could not act on Fallocate of [4, 5): Cannot allocate memory" in caplog.text
    assert registry.fenced == 0


async def test_owner_that_answers_at_once_costs_no_turn_of_the_event_loop(
    tree: Tree, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guest, "at_once", True)
    inode = await filled(tree)
    (guest := Guest(registry)).register(inode)
    for work in (
        inode.file.allocate(at(16), at(1), keep_size=False),
        inode.file.punch(at(0), at(1)),
        inode.file.truncate(at(8)),
    ):
        with pytest.raises(StopIteration):  # it is done, and has not waited
            work.send(None)
    kinds = [Fallocate, InvalidateBegin, InvalidateEnd, InvalidateBegin, InvalidateEnd]
    assert [type(message) for message in guest.heard] == kinds
    assert inode.file.pages == 7


async def test_end_is_idempotent(tree: Tree, registry: Registry) -> None:
    guest = Guest(registry)
    guest.register(await filled(tree))
    registry.end(guest)
    registry.end(guest)
    registry.check()
    with raises(errno.EBADF):
        registry.unregister(guest, FileId(1))


# -- how much one message costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lock", "most"), [(True, 16), (False, 128)])
async def test_get_pfn_of_fragmented_memory_costs_no_more_than_a_share(
    registry: Registry, tree: Tree, monkeypatch: pytest.MonkeyPatch, lock: bool, most: int
) -> None:
    """Of 8,192 pages every other is there: the reply covers what a turn allows, and the next one goes on there."""
    large = MemfdBacking(8192 * PAGE_SIZE)
    monkeypatch.setattr(tree, "_new_file", lambda ino, seals: File(large, ino, seals, held=True))
    inode = tree.create(ROOT_INO, b"fragmented", stat.S_IFREG | 0o600, 0, 0, seals=F_SEAL_GUEST)
    assert isinstance(inode, RegularFile)
    await inode.file.truncate(8192 * PAGE_SIZE)
    for page in range(0, 8192, 2):
        await inode.file.allocate(at(page), at(1), keep_size=False)
    registration = Guest(registry).register(inode)
    counted, begun, count = 0, Turns.here().total, PageMap.count

    def counting(page_map: PageMap, pages: PageRange) -> int:
        nonlocal counted
        counted += 1
        return count(page_map, pages)

    monkeypatch.setattr(PageMap, "count", counting)
    position, replies = 0, 0
    while position < 8192:
        reply = await registration.get_pfn(pages(position, 8192), alloc=False, lock=lock)
        replies += 1
        assert len(reply.runs) <= most
        covered = list(range(position, reply.pages.end))
        assert [run.pages.start for run in reply.runs] == covered
        assert [run.pfn is not None for run in reply.runs] == [page % 2 == 0 for page in covered]
        for page in range(position, reply.pages.end, 2) if lock else ():
            registration.put_pfn(pages(page, page + 1))
        position = reply.pages.end
    assert counted <= 4 * replies  # of runs at either end: what is around others is absent
    assert Turns.here().total - begun >= replies * SHARE * most // 128
    registry.end(registration.owner)
    tree.unlink(ROOT_INO, b"fragmented")


async def test_get_pfn_of_much_memory_looks_at_four_gibibytes(
    registry: Registry, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = MemfdBacking(2 << 20 << PAGE_SHIFT)
    monkeypatch.setattr(tree, "_new_file", lambda ino, seals: File(large, ino, seals, held=True))
    inode = tree.create(ROOT_INO, b"large", stat.S_IFREG | 0o600, 0, 0, seals=F_SEAL_GUEST)
    assert isinstance(inode, RegularFile)
    await inode.file.truncate(at(2 << 20))
    registration = Guest(registry).register(inode)
    reply = await registration.get_pfn(pages(100, 2 << 20), alloc=False)
    assert [(run.pages, run.pfn) for run in reply.runs] == [(pages(100, 100 + (1 << 20)), None)]
    registry.end(registration.owner)
    tree.unlink(ROOT_INO, b"large")


async def test_to_describe_much_takes_many_turns(registry: Registry, tree: Tree) -> None:
    guest = Guest(registry)
    for number in range(90):
        guest.register(await empty(tree, str(number)))
    begun, iterations, described = Turns.here().total, 0, list[dict[str, Any]]()

    async def describe() -> None:
        described.extend(await registry.describe(1 << 16, "user"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(describe)
        while not described:
            iterations += 1
            await trio.lowlevel.checkpoint()
    assert iterations >= 90 // SHARE
    assert Turns.here().total - begun >= 90
    assert [each["file"] for each in described[0]["files"]] == list(guest.registrations)
    assert await registry.describe(1 << 16, "user", lambda owner: owner is not guest) == []
    [short] = await registry.describe(500, "user")
    assert 0 < len(short["files"]) < 20
    assert len(json.dumps(short)) <= 500
