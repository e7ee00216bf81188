"""The protocol without I/O: two ends against each other, and every way in which a message can be wrong."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.connection import (
    MAX_IN_FLIGHT,
    MAX_MESSAGE,
    Connection,
    LocalProtocolError,
    RemoteProtocolError,
    RequestId,
    Role,
    State,
)
from memfs.contract.protocol.messages import (
    MAX_ERRNO,
    MESSAGES,
    NO_FILE,
    NO_TOKEN,
    VERSION,
    Ack,
    AllowPreserve,
    ConvertBegin,
    ConvertEnd,
    Done,
    Failed,
    Fallocate,
    Fenced,
    FileId,
    GetPfn,
    Hello,
    HelloReply,
    InvalidateBegin,
    InvalidateEnd,
    Launch,
    Malformed,
    Measured,
    Message,
    PfnReply,
    PfnRun,
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.units import Pfn
from tests.helpers import datagram, packed, pages

FILE = FileId(7)
OTHER = FileId(8)
RANGES = PageRanges.of([pages(1, 3), pages(5, 6)])


u64 = st.integers(0, (1 << 64) - 1)
ranges = st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40)).map(lambda each: pages(each[0], sum(each)))
text = st.text(st.characters(codec="utf-8"), max_size=100)


@st.composite
def many_ranges(draw: st.DrawFn, at_least: int) -> PageRanges:
    edges = draw(st.sets(st.integers(0, 1 << 40), min_size=2 * at_least, max_size=20))
    ends = sorted(edges)[: len(edges) // 2 * 2]
    return PageRanges(np.array(ends, np.int64).reshape(-1, 2))


def conversions(kind: type[ConvertBegin | ConvertEnd], at_least: int) -> st.SearchStrategy[Any]:
    files = st.tuples(u64, u64).filter(lambda pair: pair[0] != pair[1])
    return files.flatmap(
        lambda pair: st.builds(kind, st.just(pair[0]), st.just(pair[1]), st.booleans(), many_ranges(at_least))
    )


@st.composite
def pfn_replies(draw: st.DrawFn) -> PfnReply:
    start = draw(st.integers(0, 1000))
    position, runs = start, []
    for length, pfn, order in draw(
        st.lists(
            st.tuples(st.integers(1, 50), st.none() | st.integers(0, 1 << 40), st.sampled_from([0, 9, 18])),
            min_size=1,
            max_size=20,
        )
    ):
        runs.append(PfnRun(pages(position, position + length), None if pfn is None else Pfn(pfn), order))
        position += length
    return PfnReply(FILE, pages(start, position), tuple(runs))


MESSAGE: dict[type[Message], st.SearchStrategy[Any]] = {
    Hello: st.builds(Hello, st.just(1), st.integers(1, 9), text),
    HelloReply: st.builds(HelloReply, st.integers(1, 9), st.integers(1, 1 << 20)),
    Register: st.builds(Register),
    Registered: st.builds(Registered, u64, u64, u64, u64, st.sampled_from([4096, 2 << 20, 1 << 30])),
    Unregister: st.builds(Unregister, u64),
    GetPfn: st.builds(GetPfn, u64, ranges, st.booleans(), st.booleans()),
    PfnReply: pfn_replies(),
    PutPfn: st.builds(PutPfn, u64, ranges, st.booleans()),
    Populate: st.builds(
        Populate,
        st.tuples(st.integers(0, 1 << 40), st.integers(1, Populate.MAX_PAGES)).map(
            lambda each: pages(each[0], sum(each))
        ),
        st.integers(0, (1 << 63) - 1),
    ),
    Launch: st.builds(Launch, u64),
    AllowPreserve: st.builds(AllowPreserve, u64),
    Measured: st.builds(Measured, st.binary(min_size=48, max_size=48)),
    Done: st.builds(Done),
    Failed: st.builds(Failed, st.integers(1, 133), text),
    InvalidateBegin: st.builds(InvalidateBegin, u64, ranges),
    InvalidateEnd: st.builds(InvalidateEnd, u64, ranges),
    Fallocate: st.builds(Fallocate, u64, ranges),
    ConvertBegin: conversions(ConvertBegin, 1),
    ConvertEnd: conversions(ConvertEnd, 0),
    Ack: st.builds(Ack, st.integers(0, 133)),
    Fenced: st.builds(Fenced, st.integers(1, 133), text),
}


def test_every_message_is_tried() -> None:
    assert set(MESSAGE) == set(MESSAGES.values())


@given(st.sampled_from(sorted(MESSAGE, key=lambda kind: kind.TYPE)).flatmap(lambda kind: MESSAGE[kind]))
def test_what_is_packed_is_unpacked(message: Message) -> None:
    assert type(message).unpack(memoryview(message.pack())) == message


def opened() -> tuple[Connection, Connection]:
    owner, store = Connection(Role.OWNER), Connection(Role.STORE)
    number, data = owner.send(Hello())
    store.receive(data)
    _, data = store.send(HelloReply(VERSION, 4096), answers=number)
    owner.receive(data)
    return owner, store


def snapshot(connection: Connection) -> tuple[Any, ...]:
    return (
        connection.state,
        *((side.last_id, dict(side.unanswered)) for side in (connection._ours, connection._theirs)),
        connection.invalidations,
        connection.conversions,
    )


def test_a_conversation() -> None:
    owner, store = opened()
    number, data = owner.send(Register(), descriptors=1)
    assert store.receive(data, 1).message == Register()
    _, data = store.send(Registered(FILE, 3, 4096, 0), answers=number, descriptors=2)
    assert owner.receive(data, 2).answers == Register()
    begun, data = store.send(InvalidateBegin(FILE, pages(1, 2)))
    assert owner.receive(data).message == InvalidateBegin(FILE, pages(1, 2))
    assert owner.invalidations == store.invalidations == ((FILE, pages(1, 2)),)
    _, data = owner.send(Ack(), answers=begun)
    assert store.receive(data).answers == InvalidateBegin(FILE, pages(1, 2))
    _, data = store.send(InvalidateEnd(FILE, pages(1, 2)))
    owner.receive(data)
    assert not owner.invalidations
    assert not store.invalidations
    assert owner.unanswered == store.unanswered == 0
    _, data = store.send(Fenced(110, "too slow"))
    assert owner.receive(data).message == Fenced(110, "too slow")
    assert owner.state is store.state is State.CLOSED


def illegal() -> list[tuple[str, Connection, Message, RequestId | None, int]]:
    """Each message where it may not be said: by an end, in a state, as an answer, or with descriptors."""
    some: dict[type[Message], Message] = {
        Hello: Hello(),
        HelloReply: HelloReply(2, 4096),
        Register: Register(),
        Registered: Registered(FILE, 1, 1, 0),
        Unregister: Unregister(FILE),
        GetPfn: GetPfn(FILE, pages(0, 1), True),
        PfnReply: PfnReply(FILE, pages(0, 1), (PfnRun(pages(0, 1), None),)),
        PutPfn: PutPfn(FILE, pages(0, 1), True),
        Done: Done(),
        Failed: Failed(1, ""),
        InvalidateBegin: InvalidateBegin(FILE, pages(0, 1)),
        InvalidateEnd: InvalidateEnd(FILE, pages(0, 1)),
        Fallocate: Fallocate(FILE, pages(0, 1)),
        AllowPreserve: AllowPreserve(FILE),
        ConvertBegin: ConvertBegin(FILE, OTHER, True, RANGES),
        ConvertEnd: ConvertEnd(FILE, OTHER, True, RANGES),
        Ack: Ack(),
        Fenced: Fenced(1, ""),
    }
    said_when_open = {
        Role.OWNER: {Register, Unregister, GetPfn, PutPfn, AllowPreserve},
        Role.STORE: {InvalidateBegin, Fallocate, ConvertBegin, Fenced},
    }
    cases: list[tuple[str, Connection, Message, RequestId | None, int]] = []
    for role in Role:
        for state in State:
            for kind, message in some.items():
                if (role, state, kind) == (Role.OWNER, State.START, Hello):
                    continue
                if state is State.OPEN and kind in said_when_open[role]:
                    continue
                connection = opened()[list(Role).index(role)] if state is State.OPEN else Connection(role)
                connection._enter(state)
                descriptors = min(kind.DESCRIPTORS)
                cases.append((f"{kind.__name__} by {role.value} {state.value}", connection, message, None, descriptors))
                cases.append(("an answer to nothing", connection, message, RequestId(5), descriptors))
    owner, store = opened()
    cases.append(("too few descriptors", owner, Register(), None, 0))
    cases.append(("too many descriptors", owner, Register(), None, 2))
    cases.append(("a descriptor with none", store, Fallocate(FILE, pages(0, 1)), None, 1))
    return cases


def test_what_may_not_be_sent_raises_and_changes_nothing(subtests: pytest.Subtests) -> None:
    for what, connection, message, answers, descriptors in illegal():
        before = snapshot(connection)
        with subtests.test(what):
            with pytest.raises(LocalProtocolError):
                connection.send(message, answers=answers, descriptors=descriptors)
            assert snapshot(connection) == before


def test_what_may_not_be_said_raises_and_changes_nothing(subtests: pytest.Subtests) -> None:
    for what, sender, message, answers, descriptors in illegal():
        receiver = Connection(sender.role.peer)
        receiver._enter(sender.state)
        before = snapshot(receiver)
        with subtests.test(what):
            with pytest.raises(RemoteProtocolError):
                receiver.receive(packed(message, answers or 1), descriptors)
            assert snapshot(receiver) == before


GOOD = packed(GetPfn(FILE, pages(3, 9), False), 5)
MALFORMED = {
    "empty": b"",
    "header cut": GOOD[:15],
    "body cut": GOOD[:-1],
    "body too long": GOOD + b"\0",
    "other version": datagram(Done.TYPE, number=5, version=2),
    "wrong length": datagram(GetPfn.TYPE, GOOD[16:], 5, length=99),
    "unknown type": datagram(99, number=5),
    "type 0": datagram(0, number=5),
    "not a flag": GOOD[:-1] + b"\2",
    "empty range": struct.pack("<HHIQQQQB", 1, 6, 41, 5, 7, 3, 3, 0),
    "reversed range": struct.pack("<HHIQQQQB", 1, 6, 41, 5, 7, 9, 3, 0),
    "Ack of no errno": struct.pack("<HHIQI", 1, Ack.TYPE, 20, 5, MAX_ERRNO + 1),
    "range beyond all files": struct.pack("<HHIQQQQB", 1, 6, 41, 5, 7, 0, 1 << 63, 0),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_raise_and_change_nothing(name: str) -> None:
    _, store = opened()
    before = snapshot(store)
    with pytest.raises(RemoteProtocolError):
        store.receive(MALFORMED[name])
    assert snapshot(store) == before
    store.receive(GOOD)  # and what is right is still understood


def test_hello_must_be_text_and_short() -> None:
    for version, token in ((1, b""), (VERSION, NO_TOKEN)):
        for name in (b"\xff", b"x" * 513):
            body = struct.pack("<HH", version, version) + token + name
            with pytest.raises(RemoteProtocolError):
                Connection(Role.STORE).receive(datagram(Hello.TYPE, body))


def test_runs_must_cover_what_they_claim() -> None:
    header = struct.pack("<QQQ", FILE, 0, 4)
    for runs in (b"", struct.pack("<QQQ", 3, 1, 0), struct.pack("<QQQ", 5, 1, 0), struct.pack("<QQQ", 4, 1, 5), b"x"):
        owner, store = opened()
        number, data = owner.send(GetPfn(FILE, pages(0, 4), False))
        store.receive(data)
        before = snapshot(owner)
        body = header + runs
        with pytest.raises(RemoteProtocolError):
            owner.receive(datagram(PfnReply.TYPE, body, number))
        assert snapshot(owner) == before


@pytest.mark.parametrize("granule", [0, 1, 8192, (2 << 20) + 4096, 1 << 63])
def test_granule_is_the_size_of_a_page(granule: int) -> None:
    body = memoryview(struct.pack("<QQQQQ", FILE, 3, 4096, 0, granule))
    with pytest.raises(Malformed):
        Registered.unpack(body)


def test_replayed_and_reordered_requests_are_refused() -> None:
    owner, store = opened()
    first, second = owner.send(Unregister(FILE))[1], owner.send(Unregister(FILE))[1]
    store.receive(second)
    for again in (second, first):
        before = snapshot(store)
        with pytest.raises(RemoteProtocolError):
            store.receive(again)
        assert snapshot(store) == before


@pytest.mark.parametrize("end", [RANGES, PageRanges.of([])], ids=["of all", "of nothing"])
def test_a_conversion(end: PageRanges) -> None:
    """One message begins it, and one, which is not answered, ends it; of two files there is one at a time."""
    owner, store = opened()
    number, data = store.send(ConvertBegin(FILE, OTHER, True, RANGES))
    assert owner.receive(data).message == ConvertBegin(FILE, OTHER, True, RANGES)
    assert owner.conversions == store.conversions == ((FILE, OTHER),)
    for wrong in (ConvertBegin(FILE, OTHER, False, RANGES), ConvertEnd(OTHER, FILE, True, RANGES)):
        before = snapshot(owner)
        with pytest.raises(LocalProtocolError):
            store.send(wrong)
        with pytest.raises(RemoteProtocolError):
            owner.receive(packed(wrong, 99))
        assert snapshot(owner) == before
    store.receive(owner.send(Ack(), answers=number)[1])
    owner.receive(store.send(ConvertEnd(FILE, OTHER, True, end))[1])
    assert not owner.conversions
    assert not store.conversions
    assert owner.unanswered == store.unanswered == 0


def test_only_a_version_that_the_owner_speaks_can_be_the_answer(subtests: pytest.Subtests) -> None:
    for low, high, answer in ((1, 1, 2), (2, 2, 1), (1, 2, 3)):
        owner, store = Connection(Role.OWNER), Connection(Role.STORE)
        number, data = owner.send(Hello(low, high))
        store.receive(data)
        with subtests.test(f"{answer} in answer to {low} to {high}"), pytest.raises(LocalProtocolError):
            store.send(HelloReply(answer, 4096), answers=number)


def body(*ranges: int, shared: int = FILE, private: int = OTHER, to_private: int = 1) -> bytes:
    return struct.pack(f"<QQBQ{len(ranges)}q", shared, private, to_private, 0, *ranges)


@pytest.mark.parametrize(
    "wrong",
    {
        "cut short": body(1, 2)[:-1],
        "no range": body(),
        "half a range": body(1),
        "an empty range": body(1, 1),
        "a reversed range": body(2, 1),
        "below 0": body(-1, 1),
        "ranges that overlap": body(1, 4, 3, 5),
        "ranges that touch": body(1, 3, 3, 5),
        "ranges out of order": body(5, 6, 1, 2),
        "beyond all files": body(1, 1 << 52),
        "too many ranges": body(*range(2 * 513)),
        "no flag": body(1, 2, to_private=2),
        "one file on both sides": body(1, 2, shared=OTHER),
        "nobody's": body(1, 2, shared=NO_FILE, private=NO_FILE),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_no_conversion_is_refused(wrong: tuple[str, bytes]) -> None:
    with pytest.raises(Malformed):
        ConvertBegin.unpack(memoryview(wrong[1]))
    ConvertBegin.unpack(memoryview(body(1, 2, 3, 4)))


def test_an_answer_counts_once() -> None:
    owner, store = opened()
    number, data = owner.send(Unregister(FILE))
    store.receive(data)
    _, data = store.send(Done(), answers=number)
    owner.receive(data)
    with pytest.raises(RemoteProtocolError):
        owner.receive(data)
    with pytest.raises(LocalProtocolError):
        store.send(Done(), answers=number)


def test_end_without_begin_is_refused() -> None:
    owner, store = opened()
    store.send(InvalidateBegin(FILE, pages(0, 4)))
    for end in (InvalidateEnd(FILE, pages(0, 3)), InvalidateEnd(FileId(8), pages(0, 4))):
        with pytest.raises(LocalProtocolError):
            store.send(end)
        with pytest.raises(RemoteProtocolError):
            owner.receive(packed(end, 5))


def test_flood_is_refused() -> None:
    owner, store = opened()
    for _ in range(MAX_IN_FLIGHT):
        store.receive(owner.send(Unregister(FILE))[1])
    before = snapshot(store)
    with pytest.raises(LocalProtocolError):
        owner.send(Unregister(FILE))
    with pytest.raises(RemoteProtocolError):
        store.receive(packed(Unregister(FILE), 9999))
    assert snapshot(store) == before


def test_long_texts_are_cut_where_a_character_ends() -> None:
    assert Failed.unpack(memoryview(Failed(1, "ä" * 1000).pack())).text == "ä" * 256


def test_no_message_is_larger_than_allowed() -> None:
    runs = tuple(PfnRun(pages(at, at + 1), None if at % 2 else Pfn(at)) for at in range(PfnReply.MAX_RUNS))
    owner, store = opened()
    number, data = owner.send(GetPfn(FILE, pages(0, PfnReply.MAX_RUNS), False))
    store.receive(data)
    _, data = store.send(PfnReply(FILE, pages(0, PfnReply.MAX_RUNS), runs), answers=number)
    assert len(data) <= MAX_MESSAGE
    owner.receive(data)


@given(st.binary(max_size=200), st.integers(0, 3))
def test_no_bytes_raise_anything_else(data: bytes, descriptors: int) -> None:
    for connection in (*opened(), Connection(Role.STORE), Connection(Role.OWNER)):
        before = snapshot(connection)
        try:
            connection.receive(data, descriptors)
        except RemoteProtocolError:
            assert snapshot(connection) == before


@given(st.data())
def test_one_flipped_byte_is_a_message_or_refused(data: st.DataObject) -> None:
    broken = bytearray(GOOD)
    broken[data.draw(st.integers(0, len(GOOD) - 1))] ^= data.draw(st.integers(1, 255))
    _, store = opened()
    try:
        received = store.receive(bytes(broken))
    except RemoteProtocolError:
        return
    assert packed(received.message, received.id) == bytes(broken)
