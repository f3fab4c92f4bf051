"""A node goes with its worker and one comes back: the stage shrinks, grows again, and its losses stay the same.

Seconds to the first step, announced nodes, and plain Ray Train beside it: benchmarks/elastic.py.
"""

import shutil

from harness import Experiment, assert_lineage
from nodes import Nodes
from resizing import FINAL, SAME, STAGE, YAML, Resizing, differences, overrides

from orchestrator.store import open_store

STEPS = 1000  # it has to train on until both changes were made
BETWEEN = 40


def test_fewer_workers_when_a_node_is_gone_and_more_when_one_is_back(data, tmp_path):
    fixed = Experiment(tmp_path / "fixed", data, YAML)
    fixed.run(*overrides(STEPS, 2))
    experiment = fixed.copy(tmp_path / "elastic")  # with its data: preparing would hold a CPU as the stage begins
    shutil.rmtree(experiment.prefix(STAGE))
    experiment._note(STAGE).unlink()
    store = open_store(str(experiment.storage))
    with Nodes() as nodes, Resizing(experiment, nodes, store, overrides(STEPS, "[1,2]")) as run:
        run.trained(BETWEEN, 2)
        run.kill_node(1)
        run.trained(BETWEEN, 1)
        run.grow(2)
        run.finish()
    shrunk, grown = run.changes
    account = experiment.account(STAGE)
    assert [attempt.workers for attempt in account.attempts] == [2, 1, 2]
    assert account.causes == {"lost_node": 1, "preempted": 1}
    assert account.attempts[0].lost == shrunk.lost
    assert grown.lost == 0, "to grow it saves first"
    assert_lineage(experiment)
    apart, last = differences(experiment, fixed, run.changes)
    print(f"losses within {max(apart):.1e} after each change, the last one within {last:.1e}")
    assert max(apart) <= SAME
    assert last <= FINAL
