"""What there is no room for: never, which is refused at once, or not yet, which is waited for with the reason shown."""

import os
import time

import pytest
from harness import PATIENCE_S
from nodes import Nodes

from cluster.shape import ClusterParams
from orchestrator.capacity import Capacity
from stages.params import Resources

SHORT = ("stages.full_finetune.steps=6", "stages.full_finetune.schedule.warmup=2")
REFUSED_S = 60.0  # on a busy machine; 10 s on an idle one, most of it imports and the connection


@pytest.fixture(scope="module")
def nodes():
    with Nodes() as cluster:
        yield cluster


@pytest.fixture
def others(nodes):
    """Somebody else's work, which holds both CPUs until it is called to let go."""
    import ray

    class Holder:
        def there(self) -> bool:
            return True

    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    actors = [ray.remote(num_cpus=1)(Holder).remote() for _ in range(2)]
    ray.get([actor.there.remote() for actor in actors])
    taken = Capacity(None)
    until(lambda: taken.room(Resources()) == 0, "Ray's view of what is free comes some time after the fact")
    yield lambda: [ray.kill(actor) for actor in actors]
    ray.shutdown()


@pytest.mark.parametrize(
    "override, asked",
    [
        ("resources.gpus=1", r"asks for 2 workers × (1 CPU, 1 GPU)"),
        ("resources.accelerator=H100", r"asks for 2 workers × (1 CPU) on nodes with ray.io/accelerator-type=H100"),
        ("resources.cpus=2", r"asks for 2 workers × (2 CPU)"),
    ],
)
def test_what_is_not_there_is_refused_in_seconds(nodes, before_finetune, override, asked):
    began = time.monotonic()
    setting = f"stages.full_finetune.{override}"
    done = before_finetune.command("run", *SHORT, setting, "--address", nodes.address)
    seconds = time.monotonic() - began
    print(f"refused after {seconds:.1f} s")
    assert done.returncode == 2 and "Traceback" not in done.stderr and seconds < REFUSED_S
    (line,) = [line for line in done.stderr.splitlines() if "stages.full_finetune.resources" in line]
    assert asked in line and "there are 2 × (1 CPU), 1 × (0 CPU)" in line and " → " in line


def test_a_full_cluster_is_waited_for_with_the_reason_shown(nodes, before_finetune, others, start):
    driver = start(before_finetune, *SHORT, "--address", nodes.address, environment=nodes.environment)
    reason = "queued: asks for 2 workers × (1 CPU); there are 2 × (1 CPU), 1 × (0 CPU), of which free 3 × (0 CPU)"
    until = time.monotonic() + PATIENCE_S
    while reason not in driver.output:
        assert driver.process.poll() is None and time.monotonic() < until, driver.output
        time.sleep(0.2)
    assert f"other Ray jobs: process {os.getpid()} on " in driver.output
    status = before_finetune.without_ray("status", *SHORT).stdout
    assert "full_finetune is queued: asks for 2 workers" in status
    time.sleep(12)  # asked again and again it says the same, once, and starts nothing that would time out
    assert driver.output.count("queued:") == 1 and before_finetune.account("full_finetune").attempts == []
    others()
    assert driver.wait() == 0
    assert len(before_finetune.account("full_finetune").attempts) == 1
    assert "queued" not in before_finetune.without_ray("status", *SHORT).stdout


def test_a_growing_cluster_hears_of_a_wish_which_holds_nothing(nodes, others):
    """Ray's autoscaler reads this list; once Ray can place what was wished for it is let go, so that it is free."""
    from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply

    from cluster.gcs import Gcs

    def pending() -> int:
        answer = Gcs.of_this_process()._client.get_cluster_resource_state(timeout_s=5)
        return len(
            GetClusterResourceStateReply.FromString(answer).cluster_resource_state.pending_gang_resource_requests
        )

    two, grows = Resources(workers=2), ClusterParams.model_validate({"nodes": {"more": {"cpus": 1, "max": 2}}})
    with Capacity(None).wish(two, 2, 0):
        assert pending() == 0, "a cluster that starts nothing by itself is asked nothing"
    capacity = Capacity(grows)
    assert len([machine for machine in capacity.machines() if not machine.there]) == 2
    with capacity.wish(two, 2, 9):
        assert capacity.room(two) == 0
        until(lambda: pending() == 3, "the autoscaler sees two at once, and one more for each machine that may come")
        assert "the cluster is asked to start more" in capacity.waits(two)
        others()
        until(lambda: capacity.room(two) == 2, "what it was given is free again")
    with capacity.wish(two, 3, 0):
        until(lambda: pending() == 1, "three are more than there is room for")
    until(lambda: pending() == 0, "nobody wishes any more")


def until(holds, what: str) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)
