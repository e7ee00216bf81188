"""The examples in the docstrings are true, in whichever module they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import kvmsim
import memfs


def modules() -> Iterator[str]:
    """Yield the name of each module, except those that run a program when they are imported."""
    for package in (memfs, kvmsim):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(".__main__"):
                yield module.name


def with_examples() -> dict[str, list[doctest.DocTest]]:
    """Return the doctests of the modules that have any."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for name in modules():
        tests = [test for test in finder.find(importlib.import_module(name), name) if test.examples]
        if tests:
            found[name] = tests
    return found


EXAMPLES = with_examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    for test in EXAMPLES[name]:
        assert runner.run(test).failed == 0, f"{test.name}, line {test.lineno}"


def test_examples_are_found() -> None:
    assert len(EXAMPLES) >= 12
