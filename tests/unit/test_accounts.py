"""What a stage's time went into, from ledgers written on a clock that the test moves."""

import pytest

from orchestrator.accounts import account
from orchestrator.ledger import Ledger
from orchestrator.store import MemoryStore

P = "stages/train/0123456789abcdef"


class Stage:
    def __init__(self):
        self.now = 1000.0
        self.ledger = Ledger(MemoryStore(), P, clock=lambda: self.now)
        self.token = (0, 0)

    def after(self, seconds: float) -> "Stage":
        self.now += seconds
        return self

    def claim(self):
        self.token = self.ledger.claim({"host": "h"})
        return self

    def attempt(self, workers=2):
        self.token = self.ledger.start_attempt(self.token, workers)
        return self

    def append(self, kind, **fields):
        self.ledger.append(kind, self.token, **fields)
        return self

    def checkpoint(self, step, train_s):
        return self.append("checkpoint", step=step, manifest=f"{self.token}-{step}", train_s=train_s)

    @property
    def account(self):
        return account(self.ledger.entries())


def test_an_undisturbed_stage():
    stage = Stage().claim().attempt().after(10).append("started", step=0)
    stage.after(50).checkpoint(50, 48.0).after(42)
    stage.append("completed", manifest={}, summary={"steps": 90}, train_s=40.0)
    result = stage.account
    assert (result.wall_s(), result.useful_s, result.steps_lost, result.resume_s) == (102.0, 88.0, 0, None)
    assert result.goodput() == pytest.approx(88 / 102) and result.goodput(now=9e9) == result.goodput()
    assert [a.cause for a in result.attempts] == ["completed"] and not result.causes


def test_a_preemption_that_saved_loses_nothing_and_a_kill_what_came_after_the_checkpoint():
    stage = Stage().claim().attempt().after(10).append("started", step=0).after(20).checkpoint(20, 20.0)
    stage.after(1).append("preempted", step=20, reason="spot")
    stage.attempt(1).after(12).append("started", step=20).after(10).checkpoint(30, 10.0)
    stage.after(5).append("failed", error_class="lost_node", message="gone", step=35)
    stage.attempt(2).after(9).append("started", step=30).after(30)
    stage.append("completed", manifest={}, summary={"steps": 60}, train_s=30.0)
    result = stage.account
    assert [(a.cause, a.workers, a.resumed_from, a.lost) for a in result.attempts] == [
        ("preempted", 2, 0, 0), ("lost_node", 1, 20, 5), ("completed", 2, 30, 0),
    ]  # fmt: skip
    assert result.resumes_s == [12.0, 9.0] and result.steps_lost == 5 and result.useful_s == 60.0
    assert result.causes == {"preempted": 1, "lost_node": 1}


def test_a_driver_that_was_lost_and_a_fall_back_to_an_older_checkpoint():
    stage = Stage().claim().attempt().append("started", step=0).after(10).checkpoint(10, 10.0).after(10)
    stage.checkpoint(20, 10.0).after(100).claim().append("failed", error_class="lost_node", message="", step=27)
    stage.attempt().after(5).append("started", step=10).after(10).checkpoint(20, 11.0)
    result = stage.account
    assert result.attempts[0].lost == 17 and result.attempts[0].cause == "lost_node"
    assert result.useful_s == 21.0, "the step of the damaged checkpoint counts once"
    assert result.goodput(now=stage.now + 100) < result.goodput()


def test_an_attempt_that_made_no_step_delays_the_resume():
    stage = Stage().claim().attempt().append("started", step=0).after(1).append("preempted", step=1, reason="")
    stage.attempt().after(10).append("failed", error_class="lost_node", message="", step=0)
    stage.attempt().after(10).append("started", step=0)
    assert stage.account.resumes_s == [20.0]


def test_what_a_fenced_writer_left_counts_for_nothing():
    stage = Stage().claim().attempt().append("started", step=0).after(10)
    zombie = stage.token
    stage.claim().attempt()
    body = b'{"version": 2, "type": "checkpoint", "token": [%d, %d], "nonce": "x", "time": 0, "step": 5, ' % zombie
    stage.ledger.store.put(f"{P}/ledger/00000005.json", body + b'"manifest": "m", "train_s": 500.0}')
    assert len(stage.ledger.entries()) == 6 and stage.account.useful_s == 0.0


def test_nothing_was_ever_claimed():
    result = account([])
    assert (result.wall_s(), result.goodput(), result.attempts) == (0.0, None, [])
