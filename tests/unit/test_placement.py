"""Which workers fit on which machines: labels, machines that may come, and the words for both."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.shape import ClusterParams
from orchestrator.placement import Machine, allows, asked, fits, fitting, may_come, shown
from stages.params import Resources

H100 = {"ray.io/accelerator-type": "H100"}


def resources(**fields) -> Resources:
    return Resources.model_validate(fields)


@pytest.mark.parametrize(
    "selector, labels, meant",
    [
        ({}, {}, True),
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": "x"}, {}, False),
        ({"a": "!x"}, {}, True),  # as Ray's own: a node without the label is meant by "not x"
        ({"a": "!x"}, {"a": "x"}, False),
        ({"a": "in(x,y)"}, {"a": "y"}, True),
        ({"a": "in(x, y)"}, {"a": "y"}, True),
        ({"a": "in(x,y)"}, {"a": "z"}, False),
        ({"a": "!in(x,y)"}, {"a": "z"}, True),
        ({"a": "!in(x,y)"}, {"a": "x"}, False),
        ({"a": "x", "b": "y"}, {"a": "x", "b": "z"}, False),
    ],
)
def test_label_selectors(selector, labels, meant):
    assert allows(labels, selector) is meant
    assert resources(labels=selector).selector == selector


@pytest.mark.parametrize("labels", [{"a": ""}, {"a": "in()"}, {"a": "in(x"}, {"a b": "x"}, {"a": "x y"}, {"": "x"}])
def test_what_is_no_selector_is_refused(labels):
    with pytest.raises(ValidationError, match="no label selector"):
        resources(labels=labels)


def test_a_worker_never_spans_machines_and_takes_none_with_other_labels():
    two = [Machine({"CPU": 8, "GPU": 4}, H100), Machine({"CPU": 8, "GPU": 4}, {"ray.io/accelerator-type": "A100"})]
    assert fitting(resources(gpus=4, accelerator="H100"), two) == 1
    assert fitting(resources(gpus=4), two) == 2 and fitting(resources(gpus=8), two) == 0
    assert fits(resources(workers=[1, 9], gpus=2, accelerator="H100"), (), two)
    assert not fits(resources(workers=3, gpus=2, accelerator="H100"), (), two)
    assert not fits(resources(gpus=2, accelerator="H100"), [resources(workers=2, gpus=2, accelerator="H100")], two)
    assert fits(resources(gpus=2), [resources(workers=2, gpus=2, accelerator="H100")], two)


def test_work_without_a_gpu_leaves_the_gpus_free_whatever_the_order_of_the_machines():
    machines = [Machine({"CPU": 16, "GPU": 8}), Machine({"CPU": 64})]
    for order in (machines, machines[::-1]):
        assert fits(resources(workers=8, gpus=1), [resources(workers=16)], order)


def test_an_elastic_stage_beside_takes_what_there_is_for_it():
    assert not fits(resources(), [resources(workers=[1, 64])], [Machine({"CPU": 4})])
    assert fits(resources(gpus=1, cpus=1), [resources(workers=[1, 64])], [Machine({"CPU": 65, "GPU": 1})])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=5),
    st.integers(1, 6), st.integers(1, 3), st.integers(0, 2),
)  # fmt: skip
def test_alone_it_fits_where_so_many_workers_find_room(sizes, workers, cpus, gpus):
    machines = [Machine({"CPU": c, "GPU": g}) for c, g in sizes]
    one = resources(workers=workers, cpus=cpus, gpus=gpus)
    assert fits(one, (), machines) is (fitting(one, machines) >= workers)


CLUSTER = ClusterParams.model_validate(
    {"nodes": {"h100": {"cpus": 8, "gpus": 8, "accelerator": "H100", "spot": True, "max": 3}, "cpu": {"cpus": 4}}}
)


def test_machines_that_may_still_come():
    assert may_come(None, []) == []
    there = [{"stageline.io/node-type": "h100"}, {"stageline.io/node-type": "cpu"}, {}]
    coming = may_come(CLUSTER, there)
    assert [machine.room["GPU"] for machine in coming] == [8, 8] and not any(machine.there for machine in coming)
    assert allows(coming[0].labels, {**H100, "ray.io/market-type": "spot"})
    assert may_come(CLUSTER, there * 9) == []


def test_resources_can_be_a_key():
    """Parameters are: of a cache of tokenizers, for one."""
    one = {resources(labels={"a": "x"}): 1}
    assert one[resources(labels={"a": "x"})] == 1 and resources(labels={"a": "y"}) not in one


def test_words():
    assert asked(resources(workers=[2, 4], gpus=8, accelerator="H100")) == (
        "2 workers × (1 CPU, 8 GPU) on nodes with ray.io/accelerator-type=H100"
    )
    assert asked(resources()) == "1 worker × (1 CPU)"
    small = [Machine({"CPU": 4.0, "GPU": 0.0})] * 2
    assert shown([*small, *may_come(CLUSTER, [{"stageline.io/node-type": "cpu"}])]) == (
        "2 × (4 CPU), 3 × (8 CPU, 8 GPU, H100, spot, h100) not started"
    )
    assert shown([]) == "no node"
