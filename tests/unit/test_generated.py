"""Manual pages and completions say what the parsers of the command lines say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from memfs.options import _FLAGS, _VALUES

CONTRIB = Path(__file__).parents[2] / "contrib"


def test_what_is_generated_is_as_it_would_be_generated_now(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    pytest.importorskip("argparse_manpage", reason="argparse-manpage is not installed")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse of another Python words its help in another way")
    monkeypatch.setenv("COLUMNS", "100")
    generated = dict(runpy.run_path(str(CONTRIB / "generate.py"))["generated"]())
    kept = {path for folder in ("man", "completions") for path in (CONTRIB / folder).rglob("*") if path.is_file()}
    assert generated.keys() == kept
    stale = [str(path) for path, text in generated.items() if path.read_text() != text]
    assert stale == [], "run contrib/generate.py"


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
