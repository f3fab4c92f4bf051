"""When to save and when to stop, on a clock that the test moves."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.pacing import BESIDE, LONGEST_S, MTBF_S, SHORTEST_S, Pacer, failure_interval
from stages.io import Signal


class Attempt:
    """A training: steps and saves of given lengths, following what the pacer says; one save at a time, in the back."""

    def __init__(self, every, step_s=1.0, save_s=3.0, mtbf_s=MTBF_S):
        self.now, self.step_s, self.save_s = 0.0, step_s, save_s
        self.pacer = Pacer(every, mtbf_s, lambda: self.now)
        self.saves: list[int] = []  # steps at whose end one began
        self.committed: list[tuple[int, float]] = []  # (step, when)
        self.flying: tuple[int, float] | None = None
        self.signal, self.step = Signal(), 0

    def land(self):
        if self.flying is not None and self.flying[1] <= self.now:
            self.committed.append(self.flying)
            self.pacer.saved(0.01, self.save_s)
            self.flying = None

    def run(self, steps) -> bool:
        """Whether it stopped."""
        for _ in range(steps):
            self.step, self.now, signal = self.step + 1, self.now + self.step_s, self.signal
            self.land()
            self.signal = self.pacer.decide(self.step, self.step_s)
            if signal.save or signal.stop:
                if self.flying is not None:  # the last save waits for the one before
                    assert signal.stop, "one save at a time"
                    self.now = max(self.now, self.flying[1])
                    self.land()
                self.saves.append(self.step)
                self.pacer.saving()
                self.flying = (self.step, self.now + self.save_s)
            if signal.stop:
                self.now = self.flying[1]
                self.land()
                return True
        return False


def test_every_so_many_steps():
    attempt = Attempt(10)
    attempt.run(45)
    assert attempt.saves == [10, 20, 30, 40]


def test_what_falls_due_during_a_save_is_put_off_not_lost():
    attempt = Attempt(10, save_s=13.5)
    attempt.run(60)
    assert attempt.saves == [10, 25, 40, 55], "as soon as the one before is committed"


def test_auto_weighs_the_cost_of_a_save_against_the_failures():
    cheap, dear = Attempt("auto"), Attempt("auto")
    cheap.pacer.saved(0.02, 1.0)
    dear.pacer.saved(2.0, 100.0)
    assert cheap.pacer.interval_s() == pytest.approx(math.sqrt(2 * (0.02 + BESIDE * 1.0) * MTBF_S))
    assert dear.pacer.interval_s() == pytest.approx(10 * cheap.pacer.interval_s())
    often = Attempt("auto", mtbf_s=failure_interval(9, 3600.0))
    often.pacer.saved(2.0, 60.0)
    assert often.pacer.interval_s() < dear.pacer.interval_s()
    free, never = Attempt("auto"), Attempt("auto", mtbf_s=1e12)
    free.pacer.saved(0.0, 0.01)
    assert (free.pacer.interval_s(), never.pacer.interval_s()) == (SHORTEST_S, LONGEST_S)


def test_auto_saves_by_time():
    attempt = Attempt("auto", step_s=1.0, save_s=0.3, mtbf_s=1000.0)  # at first sqrt(2 · 5 · 1000) = 100 s
    attempt.run(101)
    assert attempt.saves == [100]
    attempt.run(40)  # a save was measured by now: it costs 0.04 s, so every 10 s
    assert attempt.saves[1:] == [110, 120, 130, 140]


def test_a_notice_gives_a_safety_save_then_work_then_a_last_save():
    attempt = Attempt(1000)
    attempt.run(5)
    attempt.pacer.notice(30.0, "spot")
    assert attempt.run(100)
    assert attempt.saves[0] == 7, "asked after step 6, at the end of the next"
    assert len(attempt.saves) == 2 and attempt.now <= 35.0
    assert attempt.saves[1] >= 24, "it trained on for as long as it could"
    assert attempt.committed[-1][0] == attempt.step, "nothing that was trained is lost"


def test_the_earliest_of_two_notices_counts():
    attempt = Attempt(1000)
    attempt.pacer.notice(100.0, "later")
    attempt.pacer.notice(20.0, "sooner")
    attempt.pacer.notice(60.0, "in between")
    assert attempt.run(200) and attempt.now <= 20.0 and attempt.pacer.reason == "sooner"


def test_a_notice_without_time_stops_at_the_next_step():
    attempt = Attempt(10)
    attempt.run(3)
    attempt.pacer.notice(0.0, "the driver was asked to stop")
    assert attempt.run(3) and attempt.step == 5 and attempt.saves == [5]


@settings(max_examples=100, deadline=None)
@given(
    step_s=st.floats(0.01, 3.0), save_s=st.floats(0.01, 8.0), notice_s=st.floats(30.0, 120.0),
    before=st.integers(1, 40), every=st.sampled_from(["auto", 3, 50]),
)  # fmt: skip
def test_nothing_is_lost_whenever_the_notice_leaves_time_for_two_saves(step_s, save_s, notice_s, before, every):
    """The last save is committed before the deadline, and no step is trained after it."""
    attempt = Attempt(every, step_s, save_s)
    attempt.run(before)
    deadline = attempt.now + notice_s
    attempt.pacer.notice(notice_s, "spot")
    assert attempt.run(100_000)
    assert attempt.now <= deadline
    assert attempt.committed[-1][0] == attempt.step
