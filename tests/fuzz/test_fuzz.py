"""A short run of every fuzz target: all of the corpus, and what hypothesis makes of it. The long run is `make fuzz`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import make_corpus
from .targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
SEEDS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in SEEDS if path.parent.name == name]


def mutations(name: str) -> st.SearchStrategy[bytes]:
    """Seeds of a target: cut, spliced, with bytes overwritten; or anything at all."""
    seeds = st.sampled_from(corpus(name))
    changes = st.lists(st.tuples(st.integers(0, 1 << 12), st.binary(min_size=1, max_size=9)), max_size=6)

    def change(data: bytes, other: bytes, cut: int, edits: list[tuple[int, bytes]]) -> bytes:
        changed = bytearray(data[: cut % (len(data) + 1)] + other if cut % 2 else data)
        for place, new in edits:
            at = place % (len(changed) + 1)
            changed[at : at + len(new)] = new
        return bytes(changed)

    return st.binary(max_size=300) | st.builds(change, seeds, seeds, st.integers(0, 1 << 12), changes)


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_corpus(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_seeds() -> None:
    assert {path.parent.name for path in SEEDS} == set(TARGETS)


@pytest.mark.parametrize(
    "make", [make_corpus.protocol, make_corpus.requests, make_corpus.options], ids=lambda make: make.__name__
)
def test_seeds_say_what_they_are_meant_to_say(make: Callable[[], dict[str, bytes]]) -> None:
    """They name opcodes by their place in a list: when that changes, they are to be made again."""
    for name, content in make().items():
        path = CORPUS / make.__name__ / name.replace(" ", "-")
        assert path.read_bytes() == content, f"{path.name} is out of date: python -m tests.fuzz.make_corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name: str) -> None:
    target: Callable[[bytes], None] = TARGETS[name]

    @settings(max_examples=400)
    @given(mutations(name))
    def run(data: bytes) -> None:
        target(data)

    run()
