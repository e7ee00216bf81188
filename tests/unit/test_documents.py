"""Documents say what is there."""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import dis
import inspect
import re
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from kvmsim.cli import build_parser as kvmsim_parser
from memfs.cli.main import build_parser as memfs_parser
from memfs.contract import conversion
from memfs.contract.protocol import connection, messages
from memfs.contract.protocol.connection import _REPLIES as REPLIES
from memfs.options import _FLAGS, _VALUES
from tests.e2e import tools

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/guides/*.md", "examples/*.md", ".github/**/*.md", "kvmsim/traces/*.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = r"(?:memfs|kvmsim|tests|bench(?!/out/)|demo|docs|examples|\.ci|\.github)"
#: of a path in a document, in its text or in a command; `NAME` and the like are the reader's
NAMED = re.compile(rf"`({FOLDERS}/[\w./-]*\w/?)`|(?<= )({FOLDERS}/[\w./-]*\w\.py)\b")


def text(document: str) -> str:
    return (ROOT / document).read_text()


def table(document: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading is given, as cells."""
    lines = text(document).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    last = next(number for number, line in enumerate(lines) if number > first and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:last]]


def test_threats_names_tests_that_exist() -> None:
    named = set(re.findall(r"\b((?:unit|model|e2e)/[\w/]+)", text("THREATS.md")))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / "tests" / f"{name}.py").is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", text(document))
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
    references = set(re.findall(r"\]\[(\w+)\]", text(document)))
    assert references <= set(re.findall(r"^\[(\w+)\]: https://", text(document), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    named = {found[1] or found[2] for found in NAMED.finditer(text(document))}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_readme_is_read_in_three_minutes() -> None:
    assert len(text("README.md").splitlines()) <= 100


def test_readme_quotes_an_example_that_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    example = text("examples/vmm.py")
    assert blocks
    for block in blocks:
        assert block in example or textwrap.indent(block, "    ") in example
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)  # noqa: S102: what is printed there needs nothing that is not
    functions = [each for each in names.values() if inspect.isfunction(each) and each.__globals__ is names]
    assert functions
    used = [each for function in functions for each in dis.get_instructions(function) if each.opname == "LOAD_GLOBAL"]
    assert {each.argval for each in used} <= names.keys() | vars(builtins).keys()


def test_protocol_lists_every_message() -> None:
    rows = {
        int(number): (name, fields, answers) for number, name, _, fields, answers in table("docs/PROTOCOL.md", "type")
    }
    assert set(rows) == set(messages.MESSAGES)
    for number, cls in messages.MESSAGES.items():
        name, fields, answers = rows[number]
        assert name == cls.__name__
        written = [each for each in re.findall(r"`(\w+)`", fields) if each not in ("end", "pfn", "order")]
        assert sorted(written) == sorted(field.name for field in dataclasses.fields(cls)), name
        assert {each for each in answers.split(", ") if each} == {reply.__name__ for reply in REPLIES.get(cls, ())}, (
            name
        )
    described = " ".join(re.findall(r"\*\*(.*?)\*\*", text("docs/PROTOCOL.md")))
    assert {request.__name__ for request in REPLIES} <= set(re.findall(r"\w+", described))


def test_protocol_says_the_limits() -> None:
    limits = {
        match[0]: int(row[1])
        for row in table("docs/PROTOCOL.md", "limit")
        if (match := re.findall(r"`([\w.]+)`", row[0]))
    }
    assert limits == {
        "MAX_MESSAGE": connection.MAX_MESSAGE,
        "MAX_IN_FLIGHT": connection.MAX_IN_FLIGHT,
        "MAX_DESCRIPTORS": connection.MAX_DESCRIPTORS,
        "MAX_TEXT": messages.MAX_TEXT,
        "PfnReply.MAX_RUNS": messages.PfnReply.MAX_RUNS,
        "Populate.MAX_PAGES": messages.Populate.MAX_PAGES,
        "ConvertBegin.MAX_RANGES": messages.ConvertBegin.MAX_RANGES,
    }
    assert f"The version is {messages.VERSION}." in text("docs/PROTOCOL.md")


def test_make_test_installs_the_tools_that_tests_need() -> None:
    installed = re.findall(r"\|\| echo ([\w-]+)", text("install-system-packages"))
    of_the_build = {"fuse3", "gcc", "util-linux"}  # installed to build memfs, or part of every Debian
    assert set(installed) == {*tools.PACKAGES.values(), "libfaketime"} - of_the_build


def test_make_help_lists_every_target() -> None:
    targets = set(re.findall(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)[0].split()) - {"system"}
    assert targets == set(re.findall(r"^([a-z-]+):.*## ", text("Makefile"), re.MULTILINE))


def test_architecture_says_who_answers_each_request() -> None:
    rows = table("docs/ARCHITECTURE.md", "requests")
    listed = [name for row in rows for name in re.findall(r"\b[A-Z][A-Z0-9_]{2,}\b", row[0]) if name != "ENOSYS"]
    answered = re.findall(r"^        Opcode\.(\w+): ", text("memfs/fuse/opcodes.py"), re.MULTILINE)
    assert sorted(listed) == sorted(answered)


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long options of a command line and of its commands."""
    found = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for command in action.choices.values() for option in _options(command)}
    return found


@pytest.mark.parametrize("build_parser", [memfs_parser, kvmsim_parser])
def test_manual_names_every_option(build_parser: Callable[[], argparse.ArgumentParser]) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text("docs/MANUAL.md")))
    of_both = {"--help", "--version"}
    spelt_short = {"--foreground", "--verbose"}
    assert _options(build_parser()) - named - of_both - spelt_short == set()


def test_manual_names_every_mount_option() -> None:
    named = set(re.findall(r"`(\w+)=?`", text("docs/MANUAL.md")))
    assert {*_FLAGS, *_VALUES} - named == set()


#: types of the tables of layouts, as struct(3) of Python spells them
TYPES: Final = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "u8[16]": "16s", "u8[48]": "48s"}


def test_protocol_says_the_layout_of_every_message() -> None:
    laid_out = []
    for names, fixed, nbytes, tail in table("docs/PROTOCOL.md", "body of"):
        fields = [field.split() for field in fixed.split(", ") if field]
        types = [TYPES[each] for _, each, _ in fields]
        layout = "<" + "".join(types)
        offsets = [struct.calcsize("<" + "".join(types[:number])) for number in range(len(types))]
        assert [int(offset) for offset, _, _ in fields] == offsets, names
        repeated = "<" + "".join(TYPES[each] for each in re.findall(r"\bu\d+\b", tail))
        for name in names.split(", "):
            cls: Any = getattr(messages, name)
            assert (layout, int(nbytes)) == (cls._BODY.format, cls._BODY.size), name
            run = getattr(cls, "_RUN", None)
            each = run.size if run is not None else getattr(cls, "_RANGE", 0)
            assert struct.calcsize(repeated) == each, name
            told = {field for _, _, field in fields} | set(re.findall(r"`(\w+)`", tail))
            held = {field.name for field in dataclasses.fields(cls)}
            assert told - {"0", "start", "end"} == held - {"pages"}, name
            assert ({"start", "end"} <= told) == ("pages" in held), name
            assert tail.startswith("text") == any(field.type == "str" for field in dataclasses.fields(cls)), name
            laid_out.append(cls)
    assert sorted(cls.TYPE for cls in laid_out) == sorted(messages.MESSAGES)


def test_protocol_says_the_numbers_and_errors_of_conversions() -> None:
    numbers = [int(found, 16) for row in table("docs/PROTOCOL.md", "ioctl") for found in re.findall("0x\\w{8}", row[1])]
    assert numbers == [conversion.MEMFS_IOC_GET_KEY, conversion.MEMFS_IOC_CONVERT(1)]
    structs = [
        "<" + "".join(TYPES[each] for each in re.findall(r"\bu\d+\b", row[2]))
        for row in table("docs/PROTOCOL.md", "ioctl")
    ]
    assert [struct.calcsize(each) for each in structs] == [
        conversion.KEY.size,
        conversion.MEMFS_IOC_CONVERT(1) >> 16 & 0x3FFF,
    ]
    rows = table("docs/PROTOCOL.md", "errno")
    errors = {"GET_KEY": conversion.key_of, "CONVERT": conversion.convert}
    of_every_ioctl = {"EFAULT", "ENOTTY"}
    for command, function in errors.items():
        told = {name for name, commands, _ in rows if command in commands.split(", ")}
        assert told - of_every_ioctl == set(re.findall(r"\bE[A-Z]{3,}\b", function.__doc__ or "")) - of_every_ioctl
        assert of_every_ioctl <= told
