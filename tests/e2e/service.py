"""A running `kvmsim serve` for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsim.client import Kvm


class Service:
    """A running `kvmsim serve`."""

    def __init__(self, path: Path, *options: str | Path) -> None:
        self.path = str(path)
        command = [sys.executable, "-m", "kvmsim", "serve", "--socket", self.path, *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(f"kvmsim: serving on {path}; ")

    def kvm(self) -> Kvm:
        return Kvm(self.path)

    def stop(self) -> str:
        """Have it end, as it should; returns what it said."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, said
        assert not os.path.exists(self.path)
        return said


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    started = Service(tmp_path / "kvm.sock")
    try:
        yield started
        if started.process.poll() is None:
            assert "Traceback" not in started.stop()
    finally:
        started.process.kill()
        started.process.communicate()
