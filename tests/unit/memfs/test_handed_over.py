"""Descriptors are taken that were handed over to this process, as sd_listen_fds_with_names(3) takes them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from memfs.handed_over import handed_over

PROGRAM = "import os; from memfs.handed_over import handed_over; print(handed_over(), sorted(os.environ))"


@pytest.mark.parametrize(
    ("count", "names", "expected"),
    [
        ("1", "owners", [("owners", 3)]),
        ("2", "a:b", [("a", 3), ("b", 4)]),
        ("2", "", [("unknown", 3), ("unknown", 4)]),
        ("2", "a", [("a", 3), ("unknown", 4)]),
        ("1", "a:b", [("a", 3)]),
        ("0", "", []),
        ("-1", "", []),
        ("nonsense", "", []),
    ],
)
def test_names_and_descriptors(count: str, names: str, expected: list[tuple[str, int]]) -> None:
    """In a process of its own, whose children inherit neither them nor the variables."""
    script = 'exec env LISTEN_PID=$$ LISTEN_FDS="$1" ${2:+"LISTEN_FDNAMES=$2"} "$3" -c "$4" 3</dev/null 4</dev/null'
    command = ["sh", "-c", script, "sh", count, names, sys.executable, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{expected} [")
    assert "LISTEN_" not in done.stdout


def test_another_process_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert handed_over() == []
    assert "LISTEN_FDS" not in os.environ


def test_children_inherit_none() -> None:
    script = (
        'exec env LISTEN_PID=$$ LISTEN_FDS=1 "$1" -c "import os, subprocess; from memfs.handed_over import handed_over;'
        ' handed_over(); print(os.get_inheritable(3))" 3</dev/null'
    )
    done = subprocess.run(["sh", "-c", script, "sh", sys.executable], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
