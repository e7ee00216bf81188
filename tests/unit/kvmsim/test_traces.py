"""Traces made from what lackey writes, whatever a processor or a program does."""

from __future__ import annotations

import pytest

from kvmsim.engines.trace_file import MAX_ACCESS, TraceError, read_lackey
from memfs.contract.units import PAGE_SIZE


@pytest.mark.parametrize("size", [1, 255, 256, 512, 832, 2696, 11_008, MAX_ACCESS])
@pytest.mark.parametrize("within", [0, 8, PAGE_SIZE - 8])
def test_long_accesses_are_all_there_and_cross_no_page(size: int, within: int) -> None:
    """fxsave stores 512 bytes, xsave up to 11,008."""
    trace = read_lackey([f" S {0x1FFE000000 + within:x},{size}"])
    ends = trace.records["gpa"] + trace.records["size"]
    assert trace.records["gpa"][0] == within
    assert (trace.records["gpa"][1:] == ends[:-1]).all(), "one piece follows the other"
    assert int(trace.records["size"].sum()) == size
    assert (trace.records["gpa"] % PAGE_SIZE + trace.records["size"] <= PAGE_SIZE).all()
    assert trace.records["write"].all()


def test_modified_memory_is_loaded_whole_and_then_stored() -> None:
    trace = read_lackey([" M 1ffe000000,512"])
    assert trace.records["write"].tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("size", [0, MAX_ACCESS + 1, 99_999])
def test_access_that_no_processor_makes_is_refused(size: int) -> None:
    with pytest.raises(TraceError, match="line 1"):
        read_lackey([f" L 1ffe000000,{size}"])


def test_output_glued_to_an_access_is_counted() -> None:
    trace = read_lackey(
        [
            "==12== Lackey, an example Valgrind tool",
            "I  04001a30,3",
            "hello, world",
            "hello L 1ffeffe7e0,8",
            " L 1ffeffe7e0,8hello",
            "hello",
            " S 1ffeffe7d8,8",
        ]
    )
    assert len(trace.records) == 2
    assert trace.glued == 2
