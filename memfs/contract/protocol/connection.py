r"""The messages between memfs (the store) and an owner (kvmsim), as a state machine without I/O.

Theory of operation
===================

RFC patch 01 lets KVM and the backing store exchange two tables of callbacks when a file is registered. Between
two processes a callback is a message, and a callback that returns is a message with a reply. So there are two
kinds of request, one in each direction, on one AF_UNIX SOCK_SEQPACKET connection (one datagram, one message):

    owner -> store    Hello, Register, Unregister, GetPfn, PutPfn,         answered by HelloReply, Registered, Done,
                      Populate, Launch, AllowPreserve                      PfnReply, Measured or Failed
    store -> owner    InvalidateBegin, Fallocate, ConvertBegin             each answered by Ack
    store -> owner    InvalidateEnd, ConvertEnd, Fenced                    not answered

The end of an invalidation or conversion needs no answer: pages are where they are, whatever the owner thinks of it.
Fenced is the final message of a connection.

One connection is one owner, that is, one virtual machine. When it ends, by whatever cause, everything that it
registered or locked ends with it; the protocol therefore needs no goodbye.

`Connection` holds what both ends must agree on and nothing else: the state (below), which requests are still unanswered
in each direction, and which invalidations and conversions have begun and not ended. `send` and `receive` check a
message against all of that *before* they change anything, so an illegal message raises and leaves the connection as it
was. The exception tells whose fault it is: LocalProtocolError is ours, RemoteProtocolError is the peer's, and after the
latter the connection must be closed, since nothing that a broken peer says can be believed.

    START --Hello--> GREETED --HelloReply--> OPEN --Fenced--> CLOSED
                        \---------Failed-----------------------/

Hello says which versions of the protocol an owner speaks, HelloReply which one is spoken from then on. There is one,
version 2; others are refused. The header, and the first fields of Hello, are the same in all versions.

Requests are numbered by their sender, each number larger than the one before, so that a replayed or duplicated
message is recognised. A reply carries the number of its request. Both directions are pipelined up to
MAX_IN_FLIGHT; a peer that goes past that is broken.

An owner whose memfs was killed comes back to the one that follows: its Hello has the token that HelloReply gave it, and
after HelloReply nothing is begun that had been. It then repeats the requests that were not answered, with the numbers
that they had and REPEATED set (as the kernel's FUSE does), in the same order; new ones have larger numbers than ever.

Wire format, little-endian, no pickle, every length bounded:

    header   u16 format (1), u16 type, u32 length of the whole message, u64 request number
    body     as messages.py says

File descriptors travel beside a message (SCM_RIGHTS): one with Register (the file), one or two with Registered
(the backing file, and for a guest-sealed file its page map), two with Populate (the file, and where its content comes
from). Any other message with a descriptor is refused.

Rejected: a byte stream (framing to get wrong, descriptors that attach to arbitrary bytes), JSON or pickle (parsing
cost on the fault path; a hostile peer), one connection for many owners (death would not mean one thing).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NewType

from memfs.contract.page_ranges import NO_PAGES
from memfs.contract.protocol.messages import (
    MESSAGES,
    NO_TOKEN,
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
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.units import PageRange

MAX_MESSAGE: Final = 64 * 1024  #: bytes; a datagram is never larger
MAX_IN_FLIGHT: Final = 256  #: unanswered requests in one direction
MAX_DESCRIPTORS: Final = 2  #: file descriptors beside one message

_FORMAT: Final = 1  # of the header
_HEADER: Final = struct.Struct("<HHIQ")
HEADER_SIZE: Final = _HEADER.size  #: bytes

RequestId = NewType("RequestId", int)  #: number of a request, unique per direction and owner, and REPEATED
REPEATED: Final = 1 << 63  #: in the number of a request that is sent again, since the memfs that had it was killed


class ProtocolError(Exception):
    """A message that the protocol does not allow here."""


class LocalProtocolError(ProtocolError):
    """This end tried to send what it may not send. A bug here; the connection is unharmed."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what it may not send. Close the connection: nothing more from it can be believed."""


class Role(enum.Enum):
    """The two ends of a connection."""

    OWNER = "owner"
    STORE = "store"

    @property
    def peer(self) -> Role:
        """The other end."""
        return Role.STORE if self is Role.OWNER else Role.OWNER


class State(enum.Enum):
    """States of a connection; see the picture at the top of this file."""

    START = "start"
    GREETED = "greeted"
    OPEN = "open"
    CLOSED = "closed"


# Who may say what, when, and what answers it

_REPLIES: Final[dict[type[Message], frozenset[type[Message]]]] = {
    Hello: frozenset({HelloReply, Failed}),
    Register: frozenset({Registered, Failed}),
    Unregister: frozenset({Done, Failed}),
    GetPfn: frozenset({PfnReply, Failed}),
    PutPfn: frozenset({Done, Failed}),
    Populate: frozenset({Measured, Failed}),
    Launch: frozenset({Measured, Failed}),
    AllowPreserve: frozenset({Done, Failed}),
    InvalidateBegin: frozenset({Ack}),
    Fallocate: frozenset({Ack}),
    ConvertBegin: frozenset({Ack}),
}
_IS_REPLY: Final = frozenset().union(*_REPLIES.values())


def _loop(state: State, messages: Iterable[type[Message]]) -> dict[type[Message], State]:
    return dict.fromkeys(messages, state)


_TRANSITIONS: Final[dict[Role, dict[State, dict[type[Message], State]]]] = {
    Role.OWNER: {
        State.START: {Hello: State.GREETED},
        State.OPEN: _loop(State.OPEN, (Register, Unregister, GetPfn, PutPfn, Populate, Launch, AllowPreserve, Ack)),
    },
    Role.STORE: {
        State.GREETED: {HelloReply: State.OPEN, Failed: State.CLOSED},
        State.OPEN: {
            **_loop(State.OPEN, (Registered, Done, PfnReply, Measured, Failed)),
            **_loop(State.OPEN, (InvalidateBegin, InvalidateEnd, Fallocate, ConvertBegin, ConvertEnd)),
            Fenced: State.CLOSED,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Received:
    """A message that arrived, the number it carried, and for a reply the request of ours that it answers."""

    id: RequestId
    message: Message
    answers: Message | None


class _Side:
    """One of the two sides: what it has said so far, and may say next."""

    __slots__ = ("last_id", "may_say", "role", "unanswered")

    def __init__(self, role: Role) -> None:
        self.role: Final = role
        self.last_id = RequestId(0)  #: the number of its last request
        self.unanswered: dict[RequestId, Message] = {}  #: its requests that have no reply yet
        self.may_say: dict[type[Message], State] = {}  #: and the state that follows

    def enter(self, state: State) -> None:
        """Note that the connection is in another state."""
        self.may_say = _TRANSITIONS[self.role].get(state, {})


class Connection:
    """One end of a connection: says which messages are allowed next, packs them and unpacks them.

    >>> from memfs.contract.protocol.messages import Hello, HelloReply
    >>> owner, store = Connection(Role.OWNER), Connection(Role.STORE)
    >>> number, data = owner.send(Hello(name="vm-1"))
    >>> store.receive(data).message
    Hello(min_version=2, max_version=2, name='vm-1')
    >>> _, data = store.send(HelloReply(version=2, page_size=4096), answers=number)
    >>> owner.receive(data).message, owner.state
    (HelloReply(version=2, page_size=4096), <State.OPEN: 'open'>)

    Not thread-safe; does no I/O.
    """

    __slots__ = ("_conversions", "_invalidations", "_is_resumed", "_ours", "_theirs", "role", "state")

    def __init__(self, role: Role) -> None:
        self.role: Final = role
        self._ours: Final = _Side(role)
        self._theirs: Final = _Side(role.peer)
        self._invalidations: list[tuple[FileId, PageRange]] = []  # begun by the store and not ended
        # of which files, and whether to the private one: begun by the store and not ended
        self._conversions: dict[tuple[FileId, FileId], bool] = {}
        self._is_resumed = False  # the owner had another connection before
        self._enter(State.START)

    def _enter(self, state: State) -> None:
        self.state = state
        self._ours.enter(state)
        self._theirs.enter(state)

    @property
    def unanswered(self) -> int:
        """How many of our own requests the peer has not answered yet."""
        return len(self._ours.unanswered)

    @property
    def invalidations(self) -> tuple[tuple[FileId, PageRange], ...]:
        """The ranges between InvalidateBegin and InvalidateEnd, oldest first."""
        return tuple(self._invalidations)

    @property
    def conversions(self) -> tuple[tuple[FileId, FileId], ...]:
        """The files, shared and private, between ConvertBegin and ConvertEnd, oldest first."""
        return tuple(self._conversions)

    @property
    def last_id(self) -> RequestId:
        """The number of our last request."""
        return self._ours.last_id

    def go_on_after(self, number: RequestId) -> None:
        """Give requests larger numbers than that from now on."""
        self._ours.last_id = max(self._ours.last_id, number)

    @property
    def ends(self) -> tuple[InvalidateEnd | ConvertEnd, ...]:
        """What would end all that has begun, with nothing done."""
        conversions = [
            ConvertEnd(shared, private, to_private, NO_PAGES)
            for (shared, private), to_private in self._conversions.items()
        ]
        return (*(InvalidateEnd(file, pages) for file, pages in self._invalidations), *conversions)

    def send(
        self,
        message: Message,
        *,
        answers: RequestId | None = None,
        repeats: RequestId | None = None,
        descriptors: int = 0,
    ) -> tuple[RequestId, bytes]:
        """Pack a message for sending and move on as if it were sent.

        `answers` is the number of the request that a reply replies to; `repeats` that of a request which is sent
        again; `descriptors` how many file descriptors will travel beside it. Returns the message's number and the
        datagram. Raises LocalProtocolError, changing nothing.
        """
        number = RequestId(self._ours.last_id + 1)
        if answers is not None:
            number = answers
        elif repeats is not None:
            number = RequestId(repeats | REPEATED)
        try:
            body = message.pack()
            self._check(self._ours, self._theirs, number, message, descriptors)
        except (Malformed, struct.error) as error:
            raise LocalProtocolError(f"{message}: {error}") from error
        if _HEADER.size + len(body) > MAX_MESSAGE:
            raise LocalProtocolError(f"{type(message).__name__} of {len(body)} bytes; at most {MAX_MESSAGE}")
        self._advance(self._ours, self._theirs, number, message)
        return number, _HEADER.pack(_FORMAT, message.TYPE, _HEADER.size + len(body), number) + body

    def receive(self, data: bytes | memoryview, descriptors: int | None = 0) -> Received:
        """Unpack one datagram that came with `descriptors` file descriptors (None: unknown) and move on.

        Raises RemoteProtocolError, changing nothing.
        """
        try:
            number, message = _parse(memoryview(data))
            self._check(self._theirs, self._ours, number, message, descriptors)
        except Malformed as error:
            raise RemoteProtocolError(str(error)) from error
        return Received(number, message, self._advance(self._theirs, self._ours, number, message))

    def close(self) -> None:
        """Allow no more messages: the transport is closed."""
        self._enter(State.CLOSED)

    def _check(self, sender: _Side, other: _Side, number: RequestId, message: Message, descriptors: int | None) -> None:
        kind = type(message)
        if kind not in sender.may_say:
            raise Malformed(f"{kind.__name__} from the {sender.role.value} while {self.state.value}")
        if descriptors is not None and descriptors not in kind.DESCRIPTORS:
            raise Malformed(f"{kind.__name__} with {descriptors} file descriptors")
        if kind in _IS_REPLY:
            request = other.unanswered.get(number)
            if request is None or kind not in _REPLIES[type(request)]:
                raise Malformed(f"{kind.__name__} does not answer request {number}")
            if isinstance(message, HelloReply) and isinstance(request, Hello):
                _check_version(message.version, request)
            return
        if number & REPEATED and not (self._is_resumed and sender.role is Role.OWNER):
            raise Malformed(f"{kind.__name__} is repeated, on the first connection")
        if number & ~REPEATED <= sender.last_id:
            raise Malformed(f"request number {number & ~REPEATED} after {sender.last_id}")
        if kind in _REPLIES and len(sender.unanswered) >= MAX_IN_FLIGHT:
            raise Malformed(f"more than {MAX_IN_FLIGHT} unanswered requests")
        if isinstance(message, InvalidateEnd) and (message.file, message.pages) not in self._invalidations:
            raise Malformed(f"InvalidateEnd of {message.pages}, which was not begun")
        if isinstance(message, ConvertBegin) and (message.shared, message.private) in self._conversions:
            raise Malformed(f"ConvertBegin of files {message.shared} and {message.private}, which was begun already")
        if isinstance(message, ConvertEnd) and (message.shared, message.private) not in self._conversions:
            raise Malformed(f"ConvertEnd of files {message.shared} and {message.private}, which was not begun")

    def _advance(self, sender: _Side, other: _Side, number: RequestId, message: Message) -> Message | None:
        kind = type(message)
        state = sender.may_say[kind]
        if state is not self.state:
            self._enter(state)
        if kind in _IS_REPLY:
            return other.unanswered.pop(number)
        sender.last_id = RequestId(number & ~REPEATED)
        if kind in _REPLIES:
            sender.unanswered[number] = message
        match message:
            case Hello():
                self._is_resumed = message.token != NO_TOKEN
            case InvalidateBegin():
                self._invalidations.append((message.file, message.pages))
            case InvalidateEnd():
                self._invalidations.remove((message.file, message.pages))
            case ConvertBegin():
                self._conversions[message.shared, message.private] = message.to_private
            case ConvertEnd():
                del self._conversions[message.shared, message.private]
        return None


def _check_version(version: int, hello: Hello) -> None:
    if not hello.min_version <= version <= hello.max_version:
        raise Malformed(f"version {version} in answer to {hello.min_version} to {hello.max_version}")


def is_answered(message: Message) -> bool:
    """Return whether a message is a request that has to be answered."""
    return type(message) in _REPLIES


def is_reply(header: bytes) -> bool:
    """Return whether a datagram that begins with these HEADER_SIZE bytes claims to be an answer."""
    return len(header) == HEADER_SIZE and MESSAGES.get(_HEADER.unpack(header)[1]) in _IS_REPLY


def _parse(data: memoryview) -> tuple[RequestId, Message]:
    if len(data) < _HEADER.size:
        raise Malformed(f"a message of {len(data)} bytes")
    form, kind, length, number = _HEADER.unpack_from(data)
    if form != _FORMAT:
        raise Malformed(f"a header of format {form}; this is {_FORMAT}")
    if length != len(data) or length > MAX_MESSAGE:
        raise Malformed(f"a message of {len(data)} bytes that claims {length}")
    if kind not in MESSAGES:
        raise Malformed(f"unknown message type {kind}")
    return RequestId(number), MESSAGES[kind].unpack(data[_HEADER.size :])
