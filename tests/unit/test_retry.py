"""Patience with a store: what is tried again, how long, and what is told meanwhile; nothing here waits."""

import logging

import pytest
from s3_service import Time

from orchestrator.errors import ErrorClass, StorageTransient, classify


@pytest.fixture
def time() -> Time:
    return Time()


RESET = ConnectionError("reset")


def fail(times: int, error: Exception = RESET, then: str = "done"):
    left = [times]

    def action() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return then

    return action


def test_delays_are_drawn_below_an_exponential_that_is_capped(time):
    most = [min(10, 0.1 * 2**n) for n in range(12)]
    assert time.retries(1e9).run(fail(12), str, "x") == "done"
    assert len(time.slept) == 12 and all(0 <= delay <= top for delay, top in zip(time.slept, most))
    assert len({round(delay / top, 3) for delay, top in zip(time.slept, most)}) == 12, "no jitter"


def test_patience_ends_with_the_cause_and_waiting_is_told(time, caplog):
    cause = ConnectionError("reset")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StorageTransient, match=r"put of k: .* over 1[01]. s: reset") as e,
    ):
        time.retries().run(fail(1000, cause), str, "put of k")
    assert e.value.__cause__ is cause and 100 < time.now <= 120
    assert classify(e.value) is ErrorClass.storage_transient
    assert 5 <= len(caplog.records) <= 7 and "put of k: waiting for the store since" in caplog.text


def test_patience_counts_from_the_first_failure(time):
    def slow_then_broken() -> str:
        time.now += 500
        return fail(1)() if len(time.slept) == 0 else "done"

    assert time.retries().run(slow_then_broken, str, "x") == "done"


def test_what_is_not_transient_is_raised_at_once(time):
    with pytest.raises(ValueError, match="ours"):
        time.retries().run(fail(1, ValueError("ours")), lambda error: "", "x")
    assert time.slept == []
