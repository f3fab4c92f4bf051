"""An experiment with a past, for tests of its report: stages that are completed, lost and resumed, failed, blocked.

Everything is written as a driver writes it, into a folder, with the clock in the test's hand.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.plan import record_mapping, stage_prefix
from orchestrator.progress import Recorder
from orchestrator.spec import Experiment, load_spec
from orchestrator.store import FileStore

YAML = """
name: family
storage: storage
model: {vision: micro-vit, language: micro-qwen2}
data: {captions: {meta: captions.json}}
defaults: {global_batch: 4, lr: 1e-3}
stages:
  data: {kind: prepare, data: captions}
  mlp_warmup: {needs: [data], steps: 100}
  full_finetune: {needs: [data, mlp_warmup], steps: 60}
  evaluate_mlp: {kind: evaluate, needs: [data, mlp_warmup]}
  evaluate_full: {kind: evaluate, needs: [data, full_finetune]}
  second: {kind: full_finetune, needs: [data, mlp_warmup], steps: 60, lr: 2e-3}
  evaluate_second: {kind: evaluate, needs: [data, second]}
  study: {kind: scaling, needs: [evaluate_mlp, evaluate_full]}
"""
FREEZE = """module          parameters         trained  state
vit                291,552               0  frozen
mlp                 66,560          66,560  trains
language           845,184               0  frozen
all              1,203,296          66,560  5.5% trains"""
PLOT = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 100"><title>L(N, D)</title>'
    b'<path d="M0 90L190 10" stroke="teal" fill="none"/><text x="10" y="20">slope</text></svg>'
)


class Run:
    """store: a folder. Each method is a piece of a stage's life; times are seconds."""

    def __init__(self, folder: Path, text: str = YAML):
        path = folder / "family.yaml"
        path.write_text(text)
        self.experiment: Experiment = load_spec(path)
        self.store = FileStore(self.experiment.storage)
        self.now = 1_750_000_000.0
        self.tokens: dict[str, tuple[int, int]] = {}

    def prefix(self, name: str) -> str:
        return stage_prefix(self.experiment.stages[name].kind.base, self.fingerprint(name))

    def fingerprint(self, name: str) -> str:
        return hashlib.sha256(name.encode()).hexdigest()

    def ledger(self, name: str) -> Ledger:
        return Ledger(self.store, self.prefix(name), clock=lambda: self.now)

    def start(self, name: str, workers: int = 2, started: int | None = None, logs: str = "") -> None:
        """A claim, an attempt and, for a training stage, its first step after `started`."""
        stage = self.experiment.stages[name]
        identity = {"kind": stage.kind.base, "version": 1, "params": stage.params.identity(), "parents": {}}
        record_mapping(self.store, self.experiment.name, name, identity, self.fingerprint(name))
        ledger = self.ledger(name)
        self.now += 1
        owner = {"host": "elsewhere", "namespace": "", "pid": 1, "started": 0.0, "nonce": "n"}
        token = ledger.claim(owner) if name not in self.tokens else self.tokens[name]
        self.tokens[name] = token = ledger.start_attempt(token, workers)
        recorder = Recorder(self.store, self.prefix(name), token)
        recorder.log(logs)
        recorder.flush()
        if started is not None:
            self.now += 8
            ledger.append("started", token, step=started)

    def rows(self, name: str, first: int, last: int, total: int, **changes: Any) -> None:
        """The metrics of steps first..last, a second each."""
        recorder = Recorder(self.store, self.prefix(name), self.tokens[name])
        for step in range(first, last + 1):
            recorder.row(step, total, row(step, total) | changes)
        recorder.flush()
        self.now += last - first + 1

    def checkpoint(self, name: str, step: int, train_s: float) -> None:
        self.append(name, "checkpoint", step=step, manifest=f"m{step}", train_s=train_s)

    def append(self, name: str, kind: str, **fields: Any) -> None:
        self.ledger(name).append(kind, self.tokens[name], **fields)

    def complete(self, name: str, summary: dict[str, Any], files: dict[str, bytes] | None = None, train_s=0.0) -> None:
        self.now += 3
        folder = f"{self.prefix(name)}/result/e0001a0001"
        for file, data in (files or {}).items():
            self.store.put(f"{folder}/{file}", data)
        listed = [{"name": file, "size": len(data), "sha256": ""} for file, data in (files or {}).items()]
        manifest = {"folder": folder, "files": listed}
        self.append(name, "completed", manifest=manifest, summary=summary, train_s=train_s)


def row(step: int, total: int) -> dict[str, Any]:
    return {
        "loss": 4.0 * math.exp(-3 * step / total) + 0.1 * math.sin(step),
        "grad_norm": 2.0 + math.sin(step / 3), "learning_rate": 1e-3 * (1 - step / total),
        "real_tokens_per_second": 9000.0 + 500 * math.cos(step), "tokens": 4000,
        "packing/token_fill": 0.98, "packing/tile_fill": 0.55, "balance/max_over_mean": 1.02, "skipped": 0,
    }  # fmt: skip


METHODS = (
    "pass", "majority", "best of, likelihood", "weighted, likelihood", "best of, certainty", "weighted, certainty",
    "best of, verifier", "dynamic",
)  # fmt: skip


def evaluation(stage: str, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """As stages/evaluate/results.py writes it, of two tasks under two prompts."""

    def score(accuracy: float, **more: Any) -> dict[str, Any]:
        return {
            "n": 400, "right": 400 * accuracy, "accuracy": accuracy, "low": accuracy - 0.03, "high": accuracy + 0.02,
            "metric": "exact", "unparsable": 0.0125, "cut": 0.0, "tokens": 12.5, **more,
        }  # fmt: skip

    ks = [1, 2, 4, 8]
    curves = []
    for i, method in enumerate(methods):
        spent = [k * (0.6 if method == "dynamic" and k > 1 else 1) for k in ks]
        found = [0.70 + 0.02 * (len(methods) - i) / len(methods) * 3 * math.log2(k) for k in ks]
        curves.append(
            {
                "task": "sum", "prompt": "cot", "checkpoint": stage, "method": method, "samples": spent,
                "tokens": [40 * k for k in spent], "accuracy": found, "low": [a - 0.02 for a in found],
                "high": [a + 0.02 for a in found], "k": ks,
            }
        )  # fmt: skip
    return {
        "stage": stage, "checkpoints": [stage], "data": "data", "sets": [],
        "parameters": {"vision": 291552, "mlp": 66560, "language": 845184},
        "tables": {
            "direct": {"sum": score(0.612), "yes": score(0.9, f1=0.874, precision=0.9, recall=0.85, yes_rate=0.48)},
            "cot": {"sum": score(0.812, categories={"easy": {"n": 10, "accuracy": 0.9}}), "yes": score(0.88)},
        },
        "maximum": {
            "sum": {"prompt": "cot", "accuracy": 0.812, "n": 400, "label": "maximum over direct, cot"},
            "yes": {"prompt": "direct", "accuracy": 0.9, "n": 400, "label": "maximum over direct, cot"},
        },
        "curves": {"sum": curves},
        "comparisons": [
            {"task": "sum", "prompt": "greedy", "a": "cot", "b": "direct", "difference": 0.2, "low": 0.15, "high": 0.25,
             "p": 0.00001, "test": "mcnemar", "better": 100, "worse": 20, "questions": 400},
            {"task": "sum", "prompt": "cot", "checkpoint": stage, "a": "dynamic@8", "b": "majority@8",
             "difference": -0.004, "low": -0.02, "high": 0.012, "p": 0.61, "test": "sign flips", "better": 7,
             "worse": 9, "questions": 400, "samples_a": 4.8, "samples_b": 8.0},
        ],
        "loss": {"all": {"nats": 0.1234, "tokens": 5321}, "sum": {"nats": 0.2, "tokens": 321}},
        "losses": {stage: {"all": {"nats": 0.1234, "tokens": 5321}, "sum": {"nats": 0.2, "tokens": 321}}},
        "sampling": {"samples": 8, "temperature": 0.7, "top_p": 1.0, "prompts": ["cot"], "seed": 0},
        "ensemble": {"threshold": 0.95}, "fallback": "none",
    }  # fmt: skip


def lived(folder: Path) -> Run:
    """The whole past: mlp_warmup lost a node and was preempted; second ran out of memory; the rest is completed."""
    run = Run(folder)
    run.start("data", workers=2)
    run.store.put(f"{run.prefix('data')}/card.html", b"<!doctype html><title>card</title>")
    shares = {"tokens_per_epoch": 664000.0, "by_type": {}, "by_set": {}}
    run.complete("data", {"kept": 9990, "rejected": 10, "tokens": 664000, "shares": shares})

    run.start(
        "mlp_warmup", workers=4, started=0, logs="100 packs of 9,990 samples in 100 steps, token fill 98.2%\n" + FREEZE
    )
    run.rows("mlp_warmup", 1, 40, 100)
    run.checkpoint("mlp_warmup", 30, 30.0)
    run.append("mlp_warmup", "failed", error_class="lost_node", message="node 10.0.0.7 is gone", step=40)
    run.start("mlp_warmup", workers=2, started=30, logs=FREEZE)
    run.rows("mlp_warmup", 31, 70, 100)
    run.checkpoint("mlp_warmup", 70, 40.0)
    run.append("mlp_warmup", "preempted", step=70, reason="drained: spot")
    run.now += 86_400  # a day in which nothing ran
    run.start("mlp_warmup", workers=4, started=70, logs=FREEZE)
    run.rows("mlp_warmup", 71, 100, 100)
    run.complete("mlp_warmup", {"steps": 100, "loss": 0.2}, train_s=30.0)

    run.start("full_finetune", started=0, logs=FREEZE)
    run.rows("full_finetune", 1, 60, 60)
    run.complete("full_finetune", {"steps": 60, "loss": 0.1}, train_s=60.0)

    old = {"sum": {"n": 397, "right": 25, "accuracy": 0.063, "low": 0.043, "high": 0.091}}
    run.start("evaluate_mlp")
    run.complete("evaluate_mlp", {"stage": "mlp_warmup"}, {"scores.json": json.dumps(old).encode()})
    run.start("evaluate_full")
    found = json.dumps(evaluation("full_finetune")).encode()
    run.complete("evaluate_full", {"stage": "full_finetune"}, {"evaluation.json": found, "scores.json": b"{}"})

    run.start("second", started=0, logs=FREEZE)
    run.rows("second", 1, 5, 60)
    run.append("second", "failed", error_class="out_of_memory", message="rank 1: 81 of 80 GB asked", step=5)

    run.start("study")
    law = {"law": {"exponents": {"vision": 0.21, "data": 0.334}}, "points": [{"vision": 1e6, "loss": 2.34}] * 3}
    run.complete("study", {}, {"scaling.json": json.dumps(law).encode(), "law.svg": PLOT})
    return run
