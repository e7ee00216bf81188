"""The version is said in one place, and both programs know it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest


@pytest.mark.parametrize("program", ["memfs", "kvmsim"])
def test_program_says_its_version(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{program} {version('memfs-kvmsim')}\n"
