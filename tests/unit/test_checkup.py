"""What is said of a cluster's nodes: what has to be mended, and what only costs speed."""

from dataclasses import replace

from cluster.facts import Facts, code_digest
from orchestrator.checkup import problems, remarks

FIT = Facts("a", "10.0.0.2", {"python": "3.11.7", "ray": "2.60.0", "stageline": "abc"}, int(64e9), int(500e9), 65536)


def nodes(*changes: dict) -> list[Facts]:
    return [replace(FIT, host=f"n{i}", **change) for i, change in enumerate(changes)]


def test_nodes_that_are_alike_and_fit():
    assert problems(nodes({}, {}, {})) == [] == remarks(nodes({}, {}, {}))


def test_versions_that_differ_are_named_with_their_nodes():
    (told,) = problems(nodes({}, {"versions": FIT.versions | {"ray": "2.59.0"}}, {}))
    assert told.startswith("ray differs: 2.60.0 on n0, n2; 2.59.0 on n1 → ")
    (told,) = problems(nodes({}, {"versions": FIT.versions | {"stageline": "xyz"}}))
    assert "the project's code differs" in told
    (told,) = problems(nodes({"versions": FIT.versions | {"ray": "not installed"}}))
    assert "ray is not installed on any node" in told


def test_storage_that_one_node_does_not_reach():
    (told,) = problems(nodes({}, {"storage": "storage s3://b: no answer → check the network"}, {}))
    assert told == "storage from n1: storage s3://b: no answer → check the network"


def test_clocks():
    assert problems(nodes({}, {"time": 0.9}, {})) == [] == remarks(nodes({}, {"time": 0.9}, {}))
    assert "the clock of n1 is -3.0 s off" in remarks(nodes({}, {"time": -3.0}, {}))[0]
    (told,) = problems(nodes({}, {"time": 60.0}, {}))
    assert told.startswith("the clock of n1 is +60.0 s off → ") and remarks(nodes({}, {"time": 60.0}, {})) == []


def test_small_shared_memory_full_disks_and_mixed_gpus_are_remarks():
    told = remarks(nodes({"shared": 64 << 20}, {"disk": int(1e9)}, {"files": 1024}))
    assert [text.split(" → ")[0] for text in told] == [
        "/dev/shm is small on n0 (0.1 GB)",
        "little room for temporary files on n1 (1 GB)",
        "a process may open 1024 files on n2",
    ]
    told = remarks(nodes({"gpus": ("H100",) * 8}, {"gpus": ("A100",) * 8}, {}))
    assert told[0].startswith("GPUs of several types: H100 on n0; A100 on n1")


def test_the_digest_of_the_code_is_the_same_twice():
    assert code_digest() == code_digest() and len(code_digest()) == 12
