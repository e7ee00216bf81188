"""Documents say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e import tools

ROOT = Path(__file__).parents[2]


def test_make_test_installs_the_tools_that_tests_need() -> None:
    installed = re.findall(r"\|\| echo ([\w-]+)", (ROOT / "install-system-packages").read_text())
    of_the_build = {"fuse3", "util-linux"}  # installed to build memfs, or part of every Debian
    assert set(installed) == {*tools.PACKAGES.values(), "libfaketime"} - of_the_build


def test_threats_names_tests_that_exist() -> None:
    named = set(re.findall(r"\b((?:unit|model|e2e)/[\w/]+)", (ROOT / "THREATS.md").read_text()))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / "tests" / f"{name}.py").is_file()] == []


@pytest.mark.parametrize("document", ["README.md", "THREATS.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / document).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
