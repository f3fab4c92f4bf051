"""What a driver asks of its cluster: which machines there are, and for more where there may be any. Without Ray."""

from types import SimpleNamespace

import pytest

from cluster.gcs import Unanswered
from cluster.nodes import Place
from cluster.shape import NODE_TYPE, ClusterParams
from orchestrator import capacity as module
from orchestrator.capacity import Capacity
from stages.params import Resources

GROWS = ClusterParams.model_validate({"nodes": {"m": {"cpus": 8, "max": 2}}})
TWO = Resources(workers=2, cpus=4)


def machine(number: int) -> Place:
    return Place(str(number), "10.0.0.1", False, {NODE_TYPE: "m"}, {"CPU": 8.0, "GPU": 0.0}, {"CPU": 0.0, "GPU": 0.0})


@pytest.fixture
def cluster(monkeypatch):
    """looks: what places() gives, one after the other, the last one for ever; waited: seconds between."""
    its = SimpleNamespace(looks=[], waited=[], groups=[])

    def places():
        look = its.looks.pop(0) if len(its.looks) > 1 else its.looks[0]
        if isinstance(look, Exception):
            raise look
        return look

    def make(self, resources, workers):
        its.groups.append(workers)
        self._wishes.append(SimpleNamespace(wait=lambda seconds: False))
        return self._wishes[-1]

    monkeypatch.setattr(module, "places", places)
    monkeypatch.setattr(Capacity, "_make", make)
    monkeypatch.setattr(Capacity, "_drop", lambda self, wish: self._wishes.remove(wish))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: sum(its.waited), sleep=its.waited.append))
    return its


def test_a_cluster_at_its_most_is_asked_for_nothing_and_that_is_told(cluster):
    cluster.looks = [[machine(1), machine(2)]]
    capacity = Capacity(GROWS)
    with capacity.wish(TWO, 2, 0) as asked:
        assert not asked and cluster.groups == []
    cluster.looks = [[machine(1)]]
    with capacity.wish(TWO, 2, 0) as asked:
        assert asked and cluster.groups == [2] and len(capacity._wishes) == 1
    assert capacity._wishes == []


def test_a_service_that_is_mute_at_first_is_given_time(cluster):
    cluster.looks = [Unanswered("mute")] * 3 + [[machine(1)]]
    assert [its.room["CPU"] for its in Capacity().machines()] == [8.0] and len(cluster.waited) == 3


def test_a_service_that_stays_mute_is_waited_for_once_and_nothing_is_known(cluster):
    cluster.looks = [Unanswered("mute")]
    capacity = Capacity(GROWS)
    assert capacity.machines() == [] and sum(cluster.waited) > module.FIRST_LOOK_S
    waited = len(cluster.waited)
    assert capacity.machines() == [] and capacity.room(TWO) == 0 and len(cluster.waited) == waited


def test_a_service_that_answered_before_is_not_waited_for(cluster):
    cluster.looks = [[machine(1)], Unanswered("mute")]
    capacity = Capacity()
    assert capacity.machines() == capacity.machines() != [] and cluster.waited == []
