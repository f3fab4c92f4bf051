"""What is said of a cluster's nodes: what has to be mended, and what only costs speed."""

import io
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from rich.console import Console

from cluster import survey
from cluster.allreduce import Measured
from cluster.facts import Facts, code_digest, facts
from cluster.nodes import Place
from cluster.survey import Silent
from orchestrator.checkup import measurable, problems, remarks
from orchestrator.cli import cluster_check
from orchestrator.onestorage import not_shared
from orchestrator.store import FileStore

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


def place(number: int, cpus=8.0, gpus=0.0, free_cpus: float | None = None, free_gpus: float | None = None) -> Place:
    free = {"CPU": cpus if free_cpus is None else free_cpus, "GPU": gpus if free_gpus is None else free_gpus}
    return Place(f"id{number}", f"10.0.0.{number}", number == 0, {}, {"CPU": cpus, "GPU": gpus}, free)


HEAD = place(0, cpus=0)


def test_a_node_without_torch_tells_so_and_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    its = facts("10.0.0.2")
    assert its.gpus == () and "torch" in its.torch
    broken = replace(FIT, host="n1", torch="libcudart.so.12: cannot open", versions=FIT.versions | {"torch": "2.13.0"})
    (told,) = problems([replace(broken, host="n0", torch=""), broken])
    assert told.startswith("torch cannot be imported on n1: libcudart.so.12: cannot open → ")
    without = replace(broken, torch=its.torch, versions=FIT.versions | {"torch": "not installed"})
    (told,) = problems([replace(broken, host="n0", torch=""), without])
    assert told.startswith("torch differs: ") and "not installed on n1" in told, "once"


def test_nodes_are_asked_at_once_and_each_answers_for_itself():
    met = threading.Barrier(4, timeout=30)

    def look(node: Place) -> str:
        met.wait()
        if node.id == "id1":
            raise GetTimeoutError("Get timed out: some object(s) not ready.")
        if node.id == "id2":
            raise RayError("")
        if node.id == "id3":
            raise RayTaskError(
                "facts", "Traceback\n  File\nModuleNotFoundError: No module named 'psutil'\n", ValueError()
            )
        return "fit"

    assert survey.each([place(i) for i in range(4)], look) == {
        "id0": "fit",
        "id1": Silent("no answer in time"),
        "id2": Silent("RayError"),
        "id3": Silent("ModuleNotFoundError: No module named 'psutil'"),
    }


@pytest.fixture
def folders(monkeypatch, tmp_path) -> dict[str, str]:
    """Functions run here instead of on nodes; {node id: the folder that is /data there}."""
    found = {f"id{i}": str(tmp_path / "shared") for i in range(4)}
    monkeypatch.setattr(survey, "on", lambda node, function, storage, *rest: function(found[node], *rest))
    monkeypatch.setattr("orchestrator.onestorage.SEEN_S", 0.0)
    return found


def test_a_folder_that_each_node_has_for_itself_is_no_storage(folders, tmp_path):
    nodes_, hosts = [place(i) for i in range(4)], {f"id{i}": f"n{i}" for i in range(4)}
    assert not_shared(nodes_, hosts, "/data") == {} == not_shared(nodes_[:1], hosts, "/data")
    folders["id1"], folders["id3"] = str(tmp_path / "own"), str(tmp_path / "another")
    found = not_shared(nodes_, hosts, "/data")
    (told,) = problems([replace(FIT, host=hosts[f"id{i}"], storage=found.get(f"id{i}", "")) for i in range(4)])
    assert told.startswith("storage from n1, n3: what n0 wrote to /data is not there, ")
    assert "s3://" in told and "--shared-folders" in told
    told = not_shared(nodes_, hosts, "s3://bucket/prefix?endpoint_url=http://10.0.0.9")["id3"]
    assert "AWS_ENDPOINT_URL" in told and "10.0.0.9" not in told
    for folder in set(folders.values()):
        assert FileStore(folder).list() == [], "no mark is left behind"


def test_a_node_that_goes_while_the_storage_is_looked_at_is_named(folders, monkeypatch):
    here = survey.on

    def goes(node, *rest):
        if node == "id2":
            raise RayError("The node died.")
        return here(node, *rest)

    monkeypatch.setattr(survey, "on", goes)
    assert not_shared([place(i) for i in range(4)], {"id0": "n0"}, "/data") == {"id2": "The node died."}
    assert FileStore(folders["id0"]).list() == []


def test_gpu_nodes_are_measured_apart_from_others_and_none_that_works():
    gpu = replace(FIT, gpus=("H100",))
    there = [
        (HEAD, replace(FIT, host="head")),
        (place(1, gpus=8), replace(gpu, host="g1")),
        (place(2, gpus=8, free_gpus=1, free_cpus=0), replace(gpu, host="g2")),
        (place(3, gpus=8, free_gpus=0.5), replace(gpu, host="g3")),
        (place(4, gpus=8), replace(FIT, host="g4")),
        (place(5), replace(FIT, host="c5")),
        (place(6, free_cpus=0.5), replace(FIT, host="c6")),
        (place(7, cpus=0.5), replace(FIT, host="c7")),
        (place(8), replace(FIT, host="c8", torch="No module named 'torch'")),
    ]
    groups, left_out = measurable(there)
    found = {backend: [its.id for its in group] for backend, group in groups.items()}
    assert found == {"NCCL": ["id1", "id2"], "gloo": ["id5", "id7"]}
    assert left_out == [
        "not measured on g3: its GPUs are in use",
        "not measured on g4: torch sees none of its GPUs",
        "not measured on c6: its CPUs are in use",
    ]
    assert measurable([there[0]]) == ({}, [])
    assert measurable([there[3]])[0] == {"NCCL": []}, "that there is nothing to measure is told"


def test_the_report_of_a_cluster_of_all_sorts(monkeypatch):
    """A node that is silent, one whose GPUs are in use, and a network that lets NCCL not through."""
    there = [HEAD, place(1, gpus=8), place(2, gpus=8), place(3, gpus=8, free_gpus=0), place(4), place(5), place(6)]
    measured = []

    def on(node, function, *_):
        if node == "id6":
            raise GetTimeoutError("Get timed out: some object(s) not ready.")
        versions = FIT.versions | {"torch": "2.13.0"}
        gpus = ("H100",) if node in ("id1", "id2", "id3") else ()
        return replace(FIT, host=f"n{node[2:]}", versions=versions, gpus=gpus) if function is facts else function()

    def measure(nodes_, gpus, megabytes):
        measured.append(([node.id for node in nodes_], gpus))
        return Measured(2, error="connection refused") if gpus else Measured(2, 1.5e9)

    monkeypatch.setattr(survey, "on", on)
    monkeypatch.setattr(cluster_check, "measure", measure)
    out = io.StringIO()
    names = {its.id: f"n{its.id[2:]}" for its in there}
    assert cluster_check._report(there, names, None, 64, Console(file=out, width=200)) == 2
    said = out.getvalue().splitlines()
    assert measured == [(["id1", "id2"], True), (["id4", "id5"], False)]
    assert [line.split(" → ")[0] for line in said if line.startswith(("problem", "remark", "all-reduce"))] == [
        "all-reduce: gloo, 2 nodes, 64 MiB: 1.50 GB/s bus bandwidth",
        "problem: n6 does not answer: no answer in time",
        "problem: an all-reduce (NCCL) between n1, n2 fails: connection refused",
        "remark: not measured on n3: its GPUs are in use",
    ]
    assert said[-1] == "7 nodes, 2 problems"
    assert any(line.split()[:2] == ["n6", "10.0.0.6"] and "no answer" in line for line in said)


def test_of_a_cluster_of_one_node_nothing_is_said_of_others(monkeypatch, folders):
    experiment = SimpleNamespace(storage="/data", stages={}, cluster=None)
    fit = replace(FIT, host="n1", versions=FIT.versions | {"torch": "2.13.0"})
    monkeypatch.setattr(cluster_check, "_facts_of", lambda _: fit)
    monkeypatch.setattr(cluster_check, "Capacity", lambda _: SimpleNamespace(machines=list))
    out = io.StringIO()
    code = cluster_check._report([place(1)], {"id1": "n1"}, experiment, 64, Console(file=out, width=200))  # pyright: ignore
    assert code == 0 and "remark: one node is there: whether others would see" in out.getvalue()
    assert "all-reduce: gloo, 1 node to measure on: it takes two" in out.getvalue()
