"""A page of docs/ as a manual page: Markdown, as markdown-it reads it, in the macros of man(7), tables by tbl(1).

Rejected: docutils with a reader of Markdown (its tables have one line a cell, and a cell here has several), and pandoc
(no Python package). What a page has beyond what is here is an error, and not left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token

_INLINE: Final = {
    "strong_open": r"\fB",
    "strong_close": r"\fR",
    "em_open": r"\fI",
    "em_close": r"\fR",
    "softbreak": "\n",
    "link_open": "",
    "link_close": "",
}
_LISTS: Final = ("bullet_list_open", "bullet_list_close", "ordered_list_open", "ordered_list_close")
_NOTHING: Final = (*_LISTS, "paragraph_close", "list_item_close")


def manual_page(markdown: str, name: str, section: int, about: str, source: str, see_also: str) -> str:
    """Return what man(1) shows of a page of Markdown. Raises ValueError for what it cannot show."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    body = "\n".join(line for line in _blocks(tokens) if line)
    head = f'\'\\" t\n.TH {name.upper()} {section} "" "{source}" "memfs and kvmsim"\n.SH NAME\n{name} \\- {about}\n'
    return f"{head}.SH DESCRIPTION\n{body}\n.SH SEE ALSO\n{see_also}\n"


def as_text(markdown: str) -> str:
    """Return a line of Markdown as text of a manual page."""
    return _lines(_text(MarkdownIt("commonmark").parseInline(markdown)[0]))


def _blocks(tokens: list[Token]) -> Iterator[str]:
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.type == "heading_open":
            text = _text(tokens[index + 1])
            if token.tag != "h1":  # which is the page's name
                yield f".SH {text.upper()}" if token.tag == "h2" else f".SS {text}"
            index += 2
        elif token.type == "inline":
            yield _lines(_text(token))
        elif token.type in ("code_block", "fence"):
            yield f".PP\n.in +4\n.nf\n{_lines(_escaped(token.content.rstrip()))}\n.fi\n.in"
        elif token.type == "table_open":
            end = next(at for at in range(index, len(tokens)) if tokens[at].type == "table_close")
            yield from _table(tokens[index:end])
            index = end
        elif token.type == "list_item_open":
            yield f".IP {token.info}. 4" if token.info else r".IP \(bu 4"
        elif token.type == "paragraph_open":
            yield "" if token.hidden else ".PP"
        elif token.type not in _NOTHING:
            raise ValueError(f"there is no {token.type} in manual pages")
        index += 1


def _table(tokens: list[Token]) -> Iterator[str]:
    """Yield a table of text blocks, whose last column is as wide as there is room."""
    rows: list[list[str]] = []
    for at, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("th_open", "td_open"):
            rows[-1].append(_text(tokens[at + 1]))
    columns = len(rows[0])
    yield ".PP\n.ad l\n.TS\nallbox tab(\x09);"
    yield " ".join(["lb"] * columns) + "\n" + " ".join([*["l"] * (columns - 1), "lx"]) + "."
    for row in rows:
        yield "\t".join(f"T{{\n{_lines(cell)}\nT}}" if cell else "" for cell in row)
    yield ".TE\n.ad b"


def _text(inline: Token) -> str:
    return "".join(map(_part, inline.children or ()))


def _part(token: Token) -> str:
    if token.type == "text":
        return _escaped(token.content)
    if token.type == "code_inline":
        return rf"\fB{_escaped(token.content)}\fR"
    if token.type in _INLINE:
        return _INLINE[token.type]
    raise ValueError(f"there is no {token.type} in manual pages")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\e").replace("-", r"\-")


def _lines(text: str) -> str:
    """Have no line begin with what troff takes for a request."""
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)
