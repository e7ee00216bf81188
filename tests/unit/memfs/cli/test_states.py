"""What is asked of mounts that do not answer."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import pytest

from memfs.cli import states
from memfs.cli.states import Asking
from memfs.cli.timed_call import NO_ANSWER


def test_path_at_which_none_answers_is_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else a thread would be left behind at each scrape of its metrics."""
    asked, may_answer = list[str](), threading.Event()

    def state_at(path: str) -> dict[str, Any]:
        asked.append(path)
        may_answer.wait()
        return {"size": len(path)}

    monkeypatch.setattr(states, "TIMEOUT", 0.01)
    asking = Asking(lambda path: partial(state_at, path))
    try:
        for _ in range(3):
            assert [answer.why_not for answer in asking.ask(["/mnt"])] == [NO_ANSWER]
        assert asked == ["/mnt"]
    finally:
        may_answer.set()
    monkeypatch.setattr(states, "TIMEOUT", 10)
    while asking.ask(["/mnt"])[0].said is None:
        time.sleep(0.01)  # it was asked already, and answers now
    assert [answer.said for answer in asking.ask(["/mnt", "/mnt/b"])] == [{"size": 4}, {"size": 6}]
    assert [answer.said for answer in asking.ask(["/mnt"])] == [{"size": 4}]
