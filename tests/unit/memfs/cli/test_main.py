"""A command imports what it needs itself: numpy and trio take longer to import than most commands take to run."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from memfs.cli.main import build_parser


def commands(parser: argparse.ArgumentParser) -> list[str]:
    (action,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return list(action.choices)


@pytest.mark.parametrize("name", commands(build_parser()))
def test_every_command_is_there_without_the_others(name: str) -> None:
    assert name in commands(build_parser(name))


@pytest.mark.parametrize("arguments", ["--version", "stat --help", "seal --help", "list --help", "umount --help"])
def test_short_commands_import_nothing_large(arguments: str) -> None:
    source = f"import sys; sys.argv[1:] = {arguments.split()!r}; from memfs.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-v", "-c", source], capture_output=True, text=True, check=True)
    large = ("numpy", "trio", "rich", "pyfuse3", "importlib.metadata")
    assert not [name for name in large if f"\nimport '{name}' " in done.stderr]
