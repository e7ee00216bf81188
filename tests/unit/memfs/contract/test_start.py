"""Ctrl-C while a command is being imported ends it without a traceback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import interruptible

START = "from memfs.contract.start import start; start('command')"


def run_command(directory: Path, source: str) -> subprocess.CompletedProcess[str]:
    (directory / "command.py").write_text(source)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(directory)!r}); {START}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=interruptible)


def test_interrupted_import_says_nothing(tmp_path: Path) -> None:
    result = run_command(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_command_is_interrupted_as_ever(tmp_path: Path) -> None:
    source = """
import os, signal, sys
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)
"""
    assert run_command(tmp_path, source).returncode == 130


def test_both_commands_start_here() -> None:
    scripts = re.findall(r'^(memfs|kvmsim) = "(.*):(.*)"$', Path("pyproject.toml").read_text(), re.MULTILINE)
    assert scripts == [(name, "memfs.contract.start", name) for name in ("memfs", "kvmsim")]
