"""The steps of the protocol, in either process, that tests can make fail, wait or die (contract/faults.py)."""

from __future__ import annotations

from typing import Final

from memfs.contract.faults import Point, Step
from memfs.contract.protocol.messages import (
    ConvertBegin,
    ConvertEnd,
    Fallocate,
    InvalidateBegin,
    InvalidateEnd,
    Message,
    Notification,
)

STEPS_OF_PEERS: Final = {
    "memfs.contract.protocol.peer:Peer._transmit": Step((Point.BEFORE_SEND,), (Point.AFTER_SEND,)),
    "memfs.contract.protocol.transport:Datagrams.receive": Step((Point.BEFORE_RECEIVE,)),
    "memfs.contract.protocol.peer:Peer._parse": Step((Point.AFTER_RECEIVE,)),
}

_BEFORE: Final[dict[type[Message], Point]] = {
    InvalidateBegin: Point.BEFORE_BEGIN,
    InvalidateEnd: Point.BEFORE_END,
    Fallocate: Point.BEFORE_TELL,
    ConvertBegin: Point.BEFORE_BEGIN,
    ConvertEnd: Point.BEFORE_END,
}
_AFTER: Final[dict[type[Message], Point]] = {
    InvalidateBegin: Point.AFTER_BEGIN,
    InvalidateEnd: Point.AFTER_END,
    Fallocate: Point.AFTER_TELL,
    ConvertBegin: Point.AFTER_BEGIN,
    ConvertEnd: Point.AFTER_END,
}


def before_notification(_: object, message: Notification, *_rest: object) -> tuple[Point]:
    """Return the point before a step of a notification."""
    return (_BEFORE[type(message)],)


def after_notification(_: object, message: Notification, *_rest: object) -> tuple[Point]:
    """Return the point after a step of a notification."""
    return (_AFTER[type(message)],)
