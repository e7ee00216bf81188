"""The state of a mount, taken apart as what anybody may have written.

Who mounts a filesystem decides what it says of itself, and one of another user may say anything. What a memfs says is
as docs/stat.schema.json has it; of what does not fit nothing is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from memfs.cli.command import CommandError

_NUMBERS: Final = (
    *("size", "used", "guest_used", "guest_page_size", "inodes_used", "open_handles", "owners", "owners_fenced"),
    *("pending", "restarts", "generation", "pid", "freed_backlog"),
)
_WORDS: Final = ("version", "backing")
_SIDES: Final = ("private", "shared")


def checked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a state, each value of its type. Raises CommandError if it makes no sense."""
    try:
        found: dict[str, Any] = {name: _number(state[name]) for name in _NUMBERS if state.get(name) is not None}
        found |= {name: str(state[name]) for name in _WORDS if name in state}
        found["passthrough"] = bool(state.get("passthrough"))
        found["registry"] = [_owner(each) for each in state.get("registry", [])]
        found["notifications"] = {str(kind): _tally(each) for kind, each in state.get("notifications", {}).items()}
        if "conversions" in state:
            said = state["conversions"]
            found["conversions"] = {
                side: {name: _number(said[side][name]) for name in ("count", "pages")} for side in _SIDES
            }
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CommandError("what it says of its state makes no sense") from error
    return found


def _number(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError("not a number")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ValueError("not seconds")
    return float(value)


def _owner(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: _number(said[name]) for name in ("owner", "acknowledged")},
        "name": str(said["name"]),
        "uid": None if said.get("uid") is None else _number(said["uid"]),
        "files": [_file(each) for each in said["files"]],
        "pending": [{"age": _seconds(each["age"])} for each in said["pending"]],
    }


def _file(said: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: _number(said[name]) for name in ("file", "ino", "size", "pages", "locked")}
    return {**numbers, "guest": bool(said["guest"])}


def _tally(said: Mapping[str, Any]) -> dict[str, Any]:
    seconds = {name: _seconds(said[name]) for name in ("seconds", "longest") if name in said}
    buckets = {str(float(bound)): _number(count) for bound, count in said["buckets"].items()}
    return {"count": _number(said["count"]), "pages": _number(said["pages"]), **seconds, "buckets": buckets}
