"""Nodes announced and killed, workers, driver and S3 killed unannounced: the same weights, and what it cost.

The full counts, and the pattern that Ray documents beside them, are in benchmarks/chaos.py.
"""

import random

from chaos import STAGE, Run, assert_undisturbed, fetched, on_s3, plan_kills
from harness import LONGER, LONGER_STEPS, SEED
from nodes import Nodes

from orchestrator.store import open_store

ANNOUNCED, DEADLINE_S = 2, 6.0
KILLS = 4  # one of each


def overrides(every: int) -> tuple[str, ...]:
    return *LONGER, f"stages.{STAGE}.checkpoint.every={every}"


def test_announced_preemptions_cost_at_most_a_step_each(before_finetune, longer, tmp_path):
    experiment, rng = before_finetune, random.Random(SEED)
    store = open_store(str(experiment.storage))
    with Nodes() as nodes, Run(experiment, nodes, store, overrides(every=1000)) as run:
        for number in range(ANNOUNCED):
            run.preempt(rng.randint(5, 60), DEADLINE_S, fresh_early=number % 2 == 0)
        run.finish()
        outcomes = run.outcomes()
    print(*outcomes, sep="\n")
    account = experiment.account(STAGE)
    assert account.causes == {"preempted": ANNOUNCED}
    assert all(outcome.lost <= 1 for outcome in outcomes)
    assert [attempt.lost for attempt in account.attempts] == [outcome.lost for outcome in outcomes] + [0]
    assert_undisturbed(experiment, longer)


def test_a_worker_a_node_the_driver_and_the_gateway_killed(before_finetune, longer, ceph, tmp_path, monkeypatch):
    for name, value in ceph.environment.items():
        monkeypatch.setenv(name, value)
    experiment, store = on_s3(before_finetune, tmp_path / "kills", f"s3://{ceph.bucket()}/chaos", ceph.endpoint_url)
    with Nodes(environment=ceph.environment) as nodes, Run(experiment, nodes, store, overrides(every=20)) as run:
        for kill in plan_kills(KILLS, LONGER_STEPS, SEED):
            run.kill(kill, ceph)
        run.finish()
        outcomes = run.outcomes()
    fetched(experiment, store)
    print(*outcomes, sep="\n")
    account = experiment.account(STAGE)
    resumed = [outcome for outcome in outcomes if outcome.resume_s is not None]
    assert {outcome.victim for outcome in resumed} >= {"worker", "raylet", "driver"}
    assert account.steps_lost == sum(outcome.lost for outcome in resumed)
    assert_undisturbed(experiment, longer)
