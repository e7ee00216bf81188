"""Requests that come again, since a predecessor had read them and was killed before it answered.

One of them may have been done: then what it changed was committed together with its reply (state/journal.py), and that
is what is sent now. All others are done again.

A request may also be what killed the predecessor. So it is written down which one is being tried, and how often,
whenever a step of its handler begins (between two of its awaits), and that it is not, when the step ends: what happens
while it waits is not its doing. One that has been the death of two daemons is answered EIO, or one bug would be a loop
without an end. It has been tried three times then, for the first time it was not one that came again.
"""

from __future__ import annotations

import errno
import logging
import struct
import types
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

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
        return await self._step_by_step(handler(request), _TRY.pack(request.number, times + 1))

    @types.coroutine
    def _step_by_step(self, work: Coroutine[Any, Any, bytes | None], tried: bytes) -> Generator[Any, Any, bytes | None]:
        """Await a handler, with it written down in each of its steps that it is being tried."""
        step: Callable[[Any], Any] = work.send
        resumed_with: Any = None
        while True:
            self._try(tried)
            self._journal.commit()
            try:
                trap = step(resumed_with)
            except StopIteration as end:
                result: bytes | None = end.value
                return result
            finally:
                del resumed_with  # if it is an exception, a cycle with its traceback
                self._try(None)
            self._journal.commit()
            try:
                step, resumed_with = work.send, (yield trap)
            except BaseException as error:  # for the handler to handle
                step, resumed_with = work.throw, error

    def _try(self, value: bytes | None) -> None:
        self._trying = value
        self._journal.changed(TRY)
