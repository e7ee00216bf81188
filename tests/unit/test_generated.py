"""Manual pages and completions say what the parsers of the command lines say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from memfs.options import _FLAGS, _VALUES
from tests.e2e.tools import needs

CONTRIB = Path(__file__).parents[2] / "contrib"


def test_what_is_generated_is_as_it_would_be_generated_now(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    pytest.importorskip("argparse_manpage", reason="argparse-manpage is not installed")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse of another Python words its help in another way")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(CONTRIB)
    generated = dict(runpy.run_path(str(CONTRIB / "generate.py"))["generated"]())
    kept = {path for folder in ("man", "completions") for path in (CONTRIB / folder).rglob("*") if path.is_file()}
    assert generated.keys() == kept
    stale = [str(path) for path, text in generated.items() if path.read_text() != text]
    assert stale == [], "run contrib/generate.py"


@needs("man")
def test_manual_pages_are_shown_without_a_warning() -> None:
    for page in sorted((CONTRIB / "man").iterdir()):
        shown = subprocess.run(
            ["man", "--local-file", "--warnings", "--encoding=utf8", str(page)],
            env={"PATH": os.environ["PATH"], "MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stderr == "", page.name
        assert "SEE ALSO" in shown.stdout


def test_exit_codes_stand_in_the_page_of_each_program() -> None:
    for name, codes in {"memfs.1": "0 1 2 130", "kvmsim.1": "0 1 2 3 130", "mount.fuse.memfs.8": "0 1 32 130"}.items():
        section = (CONTRIB / "man" / name).read_text().split(".SH EXIT STATUS\n")[1].split(".SH ")[0]
        assert re.findall(r"^\.B (\d+)$", section, re.MULTILINE) == codes.split()


def test_manual_page_names_every_option() -> None:
    page = (CONTRIB / "man" / "memfs-mount.8").read_text()
    by_default = {
        "default_permissions",
        "rw",
        "relatime",
        "atime",
        "diratime",
        "nosuid",
        "nodev",
        "exec",
        "symfollow",
        "inode64",
    }
    assert [name for name in (*_FLAGS, *_VALUES) if name not in page and name not in by_default] == []
