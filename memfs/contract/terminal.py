"""What others named, on a terminal: escape sequences in it never get there.

The names of files, what a client calls itself, what is in a trace, in an extended attribute or in an error's text may
come from anybody, and a terminal does what it reads: it can be made to show what is not there, and some answer as if
their user had typed.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import NoReturn


def printable(value: object) -> str:
    r"""Return a value as text for people, on one line, with whatever is not to be printed escaped; bytes as file names.

    >>> printable(b"\x1b]0;x\x07 \xff")
    '\\u001b]0;x\\u0007 \\xff'
    >>> printable("naïve\n")
    'naïve\\n'
    """
    text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
    return text if text.isprintable() else "".join(map(_escaped, text))


def quoted(value: object) -> str:
    r"""Return the same in quotes if anything had to be escaped, so that no value looks like several.

    >>> print(quoted("vm-1"), quoted("vm\n1"))
    vm-1 "vm\n1"
    """
    text = str(value)
    return text if text.isprintable() else f'"{printable(text)}"'


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # os.fsdecode's for a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return json.dumps(character)[1:-1]


class Parser(argparse.ArgumentParser):
    """A parser of command lines that have names in them which a shell found (`memfs seals *`)."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line and exit with code 2."""
        super().error(printable(message))
