"""What goes over the socket of `kvmsim serve`: whatever comes is a call, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsim.exits import Exit, HaltExit, HypercallExit, IoExit, MemoryErrorExit, MmioExit
from kvmsim.service.run_page import SIZE, RunPage
from kvmsim.service.wire import MAX_DATAGRAM, Answer, Call, WireError
from memfs.contract.units import Gpa


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1), st.binary(max_size=300))
def test_calls_and_answers_are_what_they_were(number: int, argument: int, payload: bytes) -> None:
    call = Call(number, argument, payload)
    assert Call.parse(call.pack()) == call
    answer = Answer(argument - (1 << 63), payload, number & 0x7FFFFFFF)
    assert Answer.parse(answer.pack()) == answer


@given(st.binary(max_size=64))
def test_anything_else_is_refused(data: bytes) -> None:
    for kind in (Call, Answer):
        try:
            assert kind.parse(data).pack() == data
        except WireError:
            assert len(data) < 16 or data[4:8] != bytes(4) or data[3] & 0x80


def test_more_than_fits_is_refused() -> None:
    with pytest.raises(WireError, match="more than"):
        Call.parse(bytes(MAX_DATAGRAM + 1))


@given(
    st.binary(min_size=1, max_size=512),
    st.sampled_from(
        [
            MemoryErrorExit(1, Gpa(0x1000), 4096),
            MmioExit(Gpa(0x1000), 8, False),
            MmioExit(Gpa(0x1000), 4096, True, bytes(4096)),
            IoExit(0x80, 4, False),
            IoExit(0x80, 4, True, bytes(4096)),
            HypercallExit(12, (1, 2, 3)),
            HypercallExit(12, tuple(range(9))),
            HaltExit(7),
        ]
    ),
)
def test_whatever_a_vmm_writes_to_its_page_stays_within_bounds(content: bytes, exit_: Exit) -> None:
    page = RunPage()
    try:
        page._page[:] = (content * SIZE)[:SIZE]
        page.put(exit_)
        page.answer(exit_)
        page.registers_to_set()
        assert isinstance(page.immediate_exit, bool)
        if isinstance(exit_, MmioExit | IoExit) and not exit_.is_write:
            assert len(exit_.data) == exit_.size
    finally:
        page.close()
