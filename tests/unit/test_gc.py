"""What gc gives back, and what it never touches. That it is safe beside living drivers is test_simulation.py's."""

import argparse
import json
import os
import time

import pytest

from orchestrator.checkpoints import Checkpoints
from orchestrator.cli.gc import gc, size
from orchestrator.control import ask_to_stop
from orchestrator.fingerprint import fingerprint
from orchestrator.gc import STALE_S, collect
from orchestrator.ledger import Ledger
from orchestrator.plan import record_mapping, stage_prefix
from orchestrator.store import FileStore, MemoryStore

P = "stages/train/0123456789abcdef"
KEPT = ("identity.json", "plan.npz", "progress.json", "metrics.jsonl", "metrics/e0001a0001-00000001.jsonl",
        "logs/e0001a0001.log")  # fmt: skip


class Stage:
    """A stage on a store, with what every stage has beside its ledger."""

    def __init__(self, store, prefix=P):
        self.store, self.prefix, self.ledger = store, prefix, Ledger(store, prefix)
        for name in KEPT:
            store.put(f"{prefix}/{name}", b"kept")
        self.claim()

    def claim(self):
        self.token = self.ledger.claim({"host": "h"})
        self.store.put(f"{self.prefix}/heartbeat/{self.token[0]}.json", b"{}")
        self.attempt()

    def attempt(self):
        self.token = self.ledger.start_attempt(self.token, 1)
        ask_to_stop(self.store, self.prefix, self.token, 1.0, "room for more")

    def checkpoints(self, keep=9) -> Checkpoints:
        return Checkpoints(self.store, self.prefix, self.ledger, self.token, keep)

    def shard(self, step) -> list:
        return [self.checkpoints().put_shard(step, "shard", b"x" * 100)]

    def commit(self, step, keep=9):
        self.checkpoints(keep).commit(step, self.shard(step), {}, 1.0)

    def result(self) -> str:
        folder = f"{self.prefix}/result/e{self.token[0]:04d}a{self.token[1]:04d}"
        self.store.put(f"{folder}/model", b"y" * 1000)
        return folder

    def complete(self):
        manifest = {"folder": self.result(), "files": []}
        self.ledger.append("completed", self.token, manifest=manifest, summary={}, train_s=1.0)

    def names(self, *folders) -> list[str]:
        """Without the prefix, in these folders."""
        keys = [key.removeprefix(self.prefix + "/") for key in self.store.list(self.prefix + "/")]
        return [name for name in keys if name.startswith(folders)]

    def collect(self, dry_run=False):
        """And whatever happens, the ledger only grows and what people read stays."""
        before = {key: self.store.get(key) for key in self.store.list(f"{self.prefix}/ledger/")}
        freed = collect(self.store, [self.prefix], dry_run)[0]
        assert freed.prefix == self.prefix
        assert all(self.store.get(key) == data for key, data in before.items())
        assert len(self.names(*KEPT)) >= len(KEPT)
        return freed


@pytest.fixture(params=[MemoryStore, FileStore])
def stage(request, tmp_path):
    return Stage(request.param(*[tmp_path] * (request.param is FileStore)))


def test_a_completed_stage_keeps_its_result_and_its_history(stage):
    stage.commit(1)
    stage.claim()
    stage.result()
    stage.attempt()
    stage.commit(2)
    stage.shard(3)  # a last save that its attempt had no need to commit
    stage.complete()
    freed = stage.collect()
    assert freed.note == "" and freed.objects == len(["1 + manifest", "2 + manifest"]) * 2 + 1 + 1 + 1 + 2
    assert stage.names("checkpoints/") == []
    assert stage.names("result/") == ["result/e0002a0002/model"]
    assert stage.names("heartbeat/", "control/") == ["control/e0002a0002.json", "heartbeat/2.json"]
    assert stage.ledger.state().checkpoints == () and stage.ledger.state().status == "completed"
    assert [entry.type for entry in stage.ledger.entries()[-2:]] == ["retired", "retired"]
    assert stage.collect().objects == 0, "a second time there is nothing"


def test_parts_go_once_the_stage_is_completed_and_not_before(stage):
    part = f"{P}/parts/000000-0123/shards/000000.tar"
    stage.store.put(part, b"x" * 50)
    stage.claim()
    collect(stage.store, [P])
    assert stage.store.exists(part), "the attempt that goes on needs it"
    stage.complete()
    collect(stage.store, [P])
    assert not stage.store.exists(part)


def test_the_checkpoints_of_a_completed_stage_are_retired_before_any_file_goes(stage, monkeypatch):
    stage.commit(1)
    stage.complete()

    def killed(key):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stage.store, "delete", killed)
        stage.collect()
    assert stage.ledger.state().checkpoints == () and len(stage.names("checkpoints/")) == 2
    assert stage.collect().objects == 2 and stage.names("checkpoints/") == []


def test_a_running_stage_loses_only_what_attempts_that_were_given_up_left(stage):
    stage.commit(1)
    stage.shard(2)
    stage.result()
    stage.attempt()
    stage.shard(2)
    stage.result()
    freed = stage.collect()
    assert stage.names("checkpoints/") == [
        "checkpoints/checkpoint-00000001/e0001a0001/manifest.json",
        "checkpoints/checkpoint-00000001/e0001a0001/shard",
        "checkpoints/checkpoint-00000002/e0001a0002/shard",
    ]
    assert stage.names("result/") == ["result/e0001a0002/model"]
    assert stage.names("control/") == ["control/e0001a0002.json"]
    assert stage.names("heartbeat/") == ["heartbeat/1.json"], "an epoch may have many attempts"
    assert freed.objects == 3 and freed.bytes > 1100
    assert [entry.type for entry in stage.ledger.entries()] == ["claimed", "attempt", "checkpoint", "attempt"]


def test_a_running_stage_with_the_newest_token_loses_nothing(stage):
    for step in range(1, 4):
        stage.commit(step)
    stage.shard(4)
    before = stage.names("")
    assert stage.collect().objects == 0 and stage.names("") == before


def test_files_that_retention_had_no_time_to_remove(stage, monkeypatch):
    stage.commit(1)
    with monkeypatch.context() as patched:
        patched.setattr(stage.store, "delete", lambda key: None)
        stage.commit(2, keep=1)
    assert len(stage.names("checkpoints/checkpoint-00000001/")) == 2
    assert stage.collect().objects == 0, "the newest token's holder may be at it"
    stage.attempt()
    assert stage.collect().objects == 3, "with the control object of the attempt before"
    assert stage.names("checkpoints/checkpoint-00000001/") == [] and len(stage.names("checkpoints/")) == 2


def test_a_dry_run_says_the_same_and_changes_nothing(stage):
    stage.commit(1)
    stage.claim()
    stage.commit(2)
    stage.complete()
    before = {name: stage.store.get(f"{P}/{name}") for name in stage.names("")}
    would = stage.collect(dry_run=True)
    assert {name: stage.store.get(f"{P}/{name}") for name in stage.names("")} == before
    assert would == stage.collect() and would.objects == 6


def test_a_stage_that_is_taken_over_meanwhile_is_left_alone(stage, monkeypatch):
    """A claim lands between the reading of the ledger and the first `retired` (a Stageline before this one made it)."""
    stage.commit(1)
    stage.complete()
    append = Ledger.append

    def late(ledger, kind, token, **fields):
        if kind == "retired":
            body = {"version": 1, "type": "claimed", "token": [2, 0], "nonce": "z", "time": 0, "owner": {}}
            stage.store.put(f"{P}/ledger/{len(ledger.entries()):08d}.json", json.dumps(body).encode())
        return append(ledger, kind, token, **fields)

    monkeypatch.setattr(Ledger, "append", late)
    freed = stage.collect()
    assert (freed.objects, freed.bytes) == (0, 0) and "(2, 0)" in freed.note
    assert len(stage.names("checkpoints/")) == 2


def test_a_ledger_of_a_newer_version_is_left_alone(stage):
    stage.shard(1)
    stage.attempt()
    body = {"version": 99, "type": "pinned", "token": list(stage.token), "nonce": "z", "time": 0}
    stage.store.put(f"{P}/ledger/{len(stage.ledger.entries()):08d}.json", json.dumps(body).encode())
    freed = stage.collect()
    assert freed.objects == 0 and "newer Stageline" in freed.note and stage.names("checkpoints/")


def test_names_that_no_stage_writes_are_not_judged(stage):
    stage.attempt()
    foreign = [f"{P}/checkpoints/readme", f"{P}/checkpoints/checkpoint-00000001/mine/shard", f"{P}/result/note.txt",
               f"{P}/heartbeat/now.json", f"{P}/control/e1a1.json"]  # fmt: skip
    for key in foreign:
        stage.store.put(key, b"")
    stage.collect()
    assert all(stage.store.exists(key) for key in foreign)


def test_a_folder_without_a_ledger():
    store = MemoryStore()
    store.put(f"{P}/result/e0001a0001/model", b"")
    assert collect(store, [P])[0].objects == 0 and store.list() == [f"{P}/result/e0001a0001/model"]


def test_temporary_files_of_writers_that_died(tmp_path):
    stage = Stage(FileStore(tmp_path))
    folder = tmp_path / P / "result" / "e0001a0001"
    folder.mkdir(parents=True)
    old, new = folder / ".tmp-old", folder / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"half" * 10)
    then = time.time() - STALE_S - 60
    os.utime(old, (then, then))
    assert (stage.collect(dry_run=True).objects, old.exists()) == (1, True)
    freed = stage.collect()
    assert (freed.objects, freed.bytes, old.exists(), new.exists()) == (1, 40, False, True)


SPEC = """name: x
storage: runs
model: {vision: tiny-vit, language: tiny-qwen2}
data: {a: {meta: a.json}}
stages:
  a_data: {kind: prepare, data: a}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}
"""


def test_the_verb_tells_what_every_stage_gave_back(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(SPEC)
    store = FileStore(tmp_path / "runs")
    for name in ("mlp_warmup", "renamed_since", "the_same_under_another_name"):
        identity = {"kind": "train", "lr": name.startswith("mlp")}
        prefix = stage_prefix("train", fingerprint(identity))
        record_mapping(store, "x", name, identity, fingerprint(identity))
        if not store.list(prefix):
            stage = Stage(store, prefix)
            stage.commit(1)
            stage.complete()
    tables = []
    for dry_run in (True, False, False):
        assert gc(argparse.Namespace(experiment=str(path), dry_run=dry_run)) == 0
        tables.append([line.split() for line in capsys.readouterr().out.splitlines()])
    would, freed, nothing = tables
    assert would[0] == ["stage", "would", "be", "freed", "objects", "note"] and would[1:] == freed[1:]
    assert [row[0] for row in freed[1:]] == ["mlp_warmup", "renamed_since,", "total"]
    assert [row[-1] for row in freed[1:]] == ["2", "2", "4"] and [row[-1] for row in nothing[1:]] == ["0", "0", "0"]
    assert len(store.list("experiments/")) == 3


def test_sizes_for_people():
    assert [size(n) for n in (0, 999, 1500, 23_400_000_000, 5e15)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "23.4 GB",
        "5,000.0 TB",
    ]
