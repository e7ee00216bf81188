"""Hooks of mkdocs: the site has the pages of docs/ and those elsewhere in the repository, with links that hold.

Pages link to each other as files of the repository, so that they can be read there. On the site README.md is the first
page, what is in docs/ lies at the top, and all else where it lies in the repository. A file that is no page (a program,
a schema) is on the site as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parents[1]
ELSEWHERE: Final = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "THREATS.md"),
    *("contrib/README.md", "kvmsim/traces/README.md"),
)
_LINK: Final = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/, and files that pages link to."""
    for path in ELSEWHERE:
        files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
    for page in [file for file in files if file.is_documentation_page()]:
        for link in _LINK.findall(Path(page.abs_src_path or "").read_text()):
            path = _path(page, link)
            if (ROOT / path).is_file() and files.get_file_from_path(_uri(path)) is None:
                files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to where things are on the site."""
    here = os.path.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: os.path.relpath(_uri(_path(page.file, link[1])), here or "."), markdown)


def _path(page: File, link: str) -> str:
    """Return what a link of a page leads to, as a path in the repository."""
    directory = os.path.dirname(os.path.realpath(page.abs_src_path or ""))
    return os.path.relpath(os.path.normpath(os.path.join(directory, link)), ROOT)


def _uri(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
