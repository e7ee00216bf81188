"""The programs in examples/ do what they say, on a mounted memfs."""

from __future__ import annotations

import sys
from pathlib import Path

from .conftest import Memfs, run

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_vmm(memfs: Memfs) -> None:
    result = run(sys.executable, EXAMPLES / "vmm.py", memfs.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "'hello, host'" in result.stdout
    assert "1 to private, 1 to shared" in result.stdout
