"""The learning rate as a pure function of the step."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from modeling.schedule import learning_rate


@pytest.mark.parametrize(("warmup", "horizon"), [(0, 20), (5, 20), (1, 7), (20, 20)])
def test_equals_the_scheduler_of_the_official_scripts(warmup, horizon):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, horizon)
    for step in range(horizon):
        assert learning_rate(step, 3e-4, warmup, horizon) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_warmup_rises_from_zero_to_the_peak():
    rates = [learning_rate(step, 1.0, 4, 100) for step in range(5)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_horizon_beyond_the_last_step_leaves_the_cosine_unfinished():
    """The paper's stage 1 stops early on a cosine of 100,000 steps."""
    assert learning_rate(1000, 1.0, 0, 100_000) == pytest.approx(0.99975, abs=1e-5)
    assert learning_rate(50_000, 1.0, 0, 100_000) == pytest.approx(0.5)


def test_past_the_horizon_it_stays_at_the_floor():
    assert learning_rate(10, 1.0, 0, 10, floor=0.1) == pytest.approx(0.1)
    assert learning_rate(10_000, 1.0, 0, 10, floor=0.1) == pytest.approx(0.1)
    assert learning_rate(10_000, 1.0, 0, 10) == pytest.approx(0.0)
    assert learning_rate(5, 1.0, 0, 10, floor=0.2) == pytest.approx(0.6)
