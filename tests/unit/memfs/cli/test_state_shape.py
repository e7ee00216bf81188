"""Which states are taken for such: what docs/stat.schema.json says, and nothing that a command would stumble over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memfs.cli.state_shape import STATE, misfit

TYPES = {"integer": int, "number": float, "string": str, "boolean": bool}
SCHEMA = json.loads((Path(__file__).parents[4] / "docs" / "stat.schema.json").read_text())
TALLY = {"count": 1, "pages": 1, "seconds": 0.5, "longest": 0.25, "buckets": {"0.1": 1}}
FILE = {"file": 1, "ino": 2, "size": 3, "pages": 4, "guest": True, "locked": 0}
PENDING = {"notification": "Fallocate", "request": None, "age": 0.5}
OWNER = {
    "owner": 1,
    "name": "vm",
    "uid": None,
    "acknowledged": 0,
    "files": [FILE],
    "pending": [PENDING],
}


def shape_of(schema: dict[str, Any]) -> object:
    """The same in the form of state_shape.py."""
    if "$ref" in schema:
        return shape_of(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "properties" in schema:
        return {name: shape_of(each) for name, each in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        return {str: shape_of(schema["additionalProperties"])}
    if "items" in schema:
        return [shape_of(schema["items"])]
    if "enum" in schema:
        return str
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    [kind] = [TYPES[each] for each in kinds if each != "null"]
    return kind


def known(documented: object, shape: object) -> object:
    """What is documented, without names that are new."""
    if isinstance(documented, list) and isinstance(shape, list):
        return [known(*each) for each in zip(documented, shape, strict=True)]
    if isinstance(documented, dict) and isinstance(shape, dict):
        return {name: known(each, shape[name]) for name, each in documented.items() if name in shape}
    return documented


def test_it_is_as_documented() -> None:
    documented: Any = shape_of(SCHEMA)
    buckets = documented["notifications"][str]["buckets"]
    buckets[float] = buckets.pop(str)  # which JSON Schema has no word for
    assert known(documented, STATE) == STATE


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"size": 5, "used": None, "last_outage": 2, "of_the_future": [{"a": 1}]},
        {"notifications": {"Fallocate": TALLY}, "registry": [OWNER, {**OWNER, "uid": 5}]},
    ],
)
def test_state_of_this_version_or_another(state: dict[str, Any]) -> None:
    assert misfit(state) is None


NO_STATES: dict[str, list[object]] = {
    "size": ["5", 5.0, True, [], {}, 10**400, float("nan"), -1, -(1 << 64)],
    "last_outage": [-0.5, float("inf"), "1", [1], 10**400],
    "passthrough": [1, "no"],
    "mountpoint": [5, ["/mnt"]],
    "conversions": [[], 5, {}, {"private": {"count": 1, "pages": 1}, "shared": None}],
    "notifications": [
        *([], {"Fallocate": 5}),
        *({"Fallocate": {**TALLY, "buckets": {bound: 1}}} for bound in ("x", "nan", "")),
    ],
    "registry": [{}, [5], [{}], [{**OWNER, "files": [{}]}], [{**OWNER, "name": None}]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NO_STATES.items() for value in values])
def test_what_is_none(name: str, value: object) -> None:
    assert misfit({"version": "1", name: value}) == name
