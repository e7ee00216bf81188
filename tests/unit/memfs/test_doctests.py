"""The examples in the docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "memfs.contract.units",
    "memfs.contract.sizes",
    "memfs.store.seals",
    "memfs.contract.protocol.connection",
    "memfs.contract.page_map",
]
MODULES += ["kvmsim.mmu.page_table"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
