"""The documentation is a site without warnings, whose pages load nothing from outside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r'<(?:script|img|link rel="(?:stylesheet|icon|preconnect)")[^>]+(?:src|href)="(https?:[^"]+)')


def build(config: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("material", reason="mkdocs-material is not installed: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir"]
    return subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)


def test_site_has_every_page_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    built = build(ROOT / "mkdocs.yml", tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    in_docs = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {*in_docs, "index", "THREATS", "contrib/index"} <= pages
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="(?:stylesheet|icon|preconnect)")[^>]+(?:src|href)="(https?:[^"]+)',
            page.read_text(),
        )
        assert loaded == [], page


def test_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    for each in ("mkdocs.yml", "docs", "contrib", "kvmsim", "examples", *(path.name for path in ROOT.glob("*.md"))):
        (tmp_path / each).symlink_to(ROOT / each)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_text("# memfs\n\n[nowhere](docs/NOWHERE.md)\n")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "NOWHERE.md" in built.stderr
