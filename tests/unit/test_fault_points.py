"""The steps that faults can be injected into exist: a method that is renamed must be renamed in the tables, too."""

from __future__ import annotations

import importlib

import pytest

import kvmsim.fault_points
import memfs.fault_points


@pytest.mark.parametrize("step", sorted({*memfs.fault_points.STEPS, *kvmsim.fault_points.STEPS}))
def test_step_is_there(step: str) -> None:
    module, _, path = step.partition(":")
    step_of: object = importlib.import_module(module)
    for name in path.split("."):
        step_of = getattr(step_of, name)
    assert callable(step_of)
