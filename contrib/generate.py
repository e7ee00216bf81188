"""Write what is generated: manual pages and completions from the parsers of the command lines and what is in docs/.

    .venv/bin/python contrib/generate.py

They are kept in the repository, since a package is built where neither the programs that generate them nor those that
the parsers import are installed. tests/unit/test_generated.py compares them with what would be written.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import shtab
from argparse_manpage.manpage import Manpage
from manual_page import as_text, manual_page

import kvmsim.cli
import memfs.cli.main
import memfs.cli.mount_helper
from memfs import __version__

HERE: Final = Path(__file__).parent
DOCS: Final = HERE.parent / "docs"
#: a shell, and the name of the file in which it looks for the completion of a program
SHELLS: Final = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}
#: what a word of a command line stands for -> how shells complete it
COMPLETED: Final = {
    "FILE": shtab.FILE,
    "PATH": shtab.FILE,
    "SOURCE": shtab.FILE,
    "TRACE": shtab.FILE,
    "LACKEY": shtab.FILE,
    "MOUNTPOINT": shtab.DIRECTORY,
}


def generated() -> Iterator[tuple[Path, str]]:
    """Yield the files and what is to be in them."""
    os.environ["COLUMNS"] = "100"  # argparse wraps lines for a terminal
    yield from _manual_pages()
    yield from _completions()


def _manual_pages() -> Iterator[tuple[Path, str]]:
    main = memfs.cli.main.build_parser()
    mount = _commands(main)["mount"]
    see_also = (
        "memfs(1), memfs-mount(8), mount.fuse.memfs(8), kvmsim(1), memfs-protocol(7), mount(8), tmpfs(5), fallocate(1)"
    )
    for name, section, about, parser in (
        ("memfs", 1, "a filesystem that is the memory of virtual machines", main),
        ("memfs-mount", 8, "mount a memfs", mount),
        ("mount.fuse.memfs", 8, "mount a memfs, for mount(8) and fstab(5)", memfs.cli.mount_helper.build_parser()),
        ("kvmsim", 1, "the KVM side of guest private memory, in userspace", kvmsim.cli.build_parser()),
    ):
        page = Manpage(parser, format="single-commands-section")
        page.prog, page.section, page.date, page.description = name, section, "", about
        page.source, page.manual = f"memfs {__version__}", "memfs and kvmsim"
        yield HERE / "man" / f"{name}.{section}", _tidy(f"{page}\n{_exit_codes(name)}\n.SH SEE ALSO\n{see_also}\n")
    protocol = (DOCS / "PROTOCOL.md").read_text()
    about = "what a memfs and the owners of its files tell each other"
    yield HERE / "man" / "memfs-protocol.7", manual_page(protocol, "memfs-protocol", 7, about, page.source, see_also)


def _exit_codes(program: str) -> str:
    """Return a section of a manual page with what the table in docs/MANUAL.md says of a program."""
    table = (DOCS / "MANUAL.md").read_text().split("### Exit codes\n\n")[1].split("\n\n")[0]
    section = ".SH EXIT STATUS"
    for row in table.splitlines()[2:]:
        code, of_ours, of_mount = (cell.strip() for cell in row.strip("|").split("|"))
        meaning = of_mount if program == "mount.fuse.memfs" else of_ours
        if meaning and (program == "kvmsim" or not meaning.startswith("`kvmsim`")):
            section += f"\n.TP\n.B {code}\n{as_text(meaning)}"
    return section


def _tidy(page: str) -> str:
    lines = (line.rstrip() for line in page.splitlines() if line.strip())
    # A line of text that begins with a period would be taken for a request of troff's.
    return "\n".join(re.sub(r"^\.(?=[a-z])(?!(nf|fi|br)$)", r"\\&.", line) for line in lines) + "\n"


def _completions() -> Iterator[tuple[Path, str]]:
    for parser in (memfs.cli.main.build_parser(), kvmsim.cli.build_parser()):
        for each in (parser, *_commands(parser).values()):
            for action in each._actions:
                if isinstance(action.metavar, str) and action.metavar in COMPLETED:
                    action.complete = COMPLETED[action.metavar]  # type: ignore[attr-defined]
        for shell, name in SHELLS.items():
            yield HERE / "completions" / shell / name.format(parser.prog), shtab.complete(parser, shell)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return commands.choices


if __name__ == "__main__":
    for path, text in generated():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
