"""Requests that come again, since a predecessor had read them and was killed before it answered.

One of them may have been done: then what it changed was committed together with its reply (state/journal.py), and that
is what is sent now. All others are done again.

A request may also be what killed the predecessor. So it is written down which one is being tried, and how often: one
that has been the death of two daemons in the middle of it is answered EIO, or one bug would be a loop without an end.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from memfs.contract.aio.eager import drive
from memfs.fuse.abi import OUT_HEADER, Request
from memfs.state.journal import Journal, last_answer

if TYPE_CHECKING:
    from memfs.fuse.channel import Handler

log = logging.getLogger(__name__)

TRY: Final = b"a"  #: the key of what is being tried: number, how often
_TRY: Final = struct.Struct("=QI")
_MOST: Final = 2


class Resent:
    """What a predecessor has left of requests. `answer` sends the kernel a reply."""

    def __init__(self, state: Mapping[bytes, bytes], journal: Journal, answer: Callable[[bytes], None]) -> None:
        self._journal: Final = journal
        self._answer: Final = answer
        self._last, self._reply = last_answer(state)
        self._tried = _TRY.unpack(state[TRY]) if TRY in state else (0, 0)
        self._trying = state.get(TRY)
        journal.keeps(TRY, lambda key: self._trying)

    async def handle(self, request: Request, handler: Handler) -> bytes | None:
        """Answer a request that comes again, or handle it again. Raises OSError, what `handler` raises."""
        if request.number == self._last:
            length, error, _ = OUT_HEADER.unpack_from(self._reply)
            self._answer(OUT_HEADER.pack(length, error, request.unique) + self._reply[OUT_HEADER.size :])
            return None
        times = self._tried[1] if self._tried[0] == request.number else 0
        if times >= _MOST:
            log.error("request %d, opcode %d, has killed memfs %d times: EIO", request.number, request.opcode, times)
            raise OSError(errno.EIO, "this request has killed memfs")
        self._try(_TRY.pack(request.number, times + 1))
        self._journal.commit()
        work = handler(request)
        try:
            trap = work.send(None)
        except StopIteration as end:
            result: bytes | None = end.value
            return result
        finally:
            self._try(None)
        self._journal.commit()
        return await drive(work, trap)

    def _try(self, value: bytes | None) -> None:
        self._trying = value
        self._journal.changed(TRY)
