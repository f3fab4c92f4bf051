"""What checkpoints cost the training: none, behind the training (the product), and synchronous, beside each other.

    python benchmarks/checkpoint.py --folder /tmp/checkpoint --hidden 1024 --layers 24 --minutes 3

Trains a random Qwen2 of the given size on text, one rank on all cores, through the product's own Trainer, StoreIO and
local store, without Ray. Every variant trains the same steps from the same weights; the rounds alternate. Slowdown is
the wall time from the end of the first step to the end of the last (with all that happens in between) over that of the
same steps without checkpoints; and within a run, where a machine's drift does not reach, the time by which steps with a
save beside them took longer than the median step without. At the end: resume from an early and from a late step, to see
that it takes the same time. Prints seed, machine, sizes, figures; --output writes JSON. Exit code 1 where the stall, or
the slowdown, of saves behind the training is above 2 %.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from orchestrator.driver import Job, parent_refs, run_stage
from orchestrator.fingerprint import fingerprint
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_experiment
from orchestrator.spec import load_spec
from orchestrator.stageio import StoreIO, Task
from orchestrator.store import open_store
from stages.io import Signal
from stages.kinds import KINDS
from stages.saving import Saver
from stages.train import Trainer

ROOT = Path(__file__).parents[1]
MOST = 0.02  # of the training
YAML = """
name: checkpoint
storage: storage
seed: 0
model: {{vision: micro-vit, language: language, tokenizer: {tokenizer}}}
data: {{text: {{meta: {data}/text.json, system: ""}}}}
stages:
  text_data: {{kind: prepare, data: text}}
  language_pretrain:
    needs: [text_data]
    steps: {steps}
    lr: 1e-4
    global_batch: 1
    packing: {{max_tokens: {tokens}, max_tiles: 1}}
    precision: fp32
    deepspeed: 1
    resources: {{workers: 1, cpus: {cpus}}}
"""


class NoSaver(Saver):
    """Never saves: it is never asked to."""


class SynchronousSaver(Saver):
    """Waits for its own upload and commit, as a plain save does."""

    def start(self, step, meta, train_s):
        before = time.perf_counter()
        super().start(step, meta, train_s)
        self.finish()
        return time.perf_counter() - before


SAVERS = {"none": NoSaver, "behind": Saver, "synchronous": SynchronousSaver}


class TimedIO(StoreIO):
    """Asks for a save by the clock, and keeps when every step ended."""

    def __init__(self, task: Task, save_every_s: float | None):
        super().__init__(task)
        self.save_every_s, self.ends, self.stalls, self.asked = save_every_s, [], [], time.monotonic()
        self.beside: list[bool] = []  # whether a save was in flight at the step's end
        self.saving_now: Callable[[], bool] = lambda: False

    def tick(self, step, total, row):
        super().tick(step, total, row)
        now = time.monotonic()
        self.ends.append(now)
        self.stalls.append(row["time/checkpoint_stall"])
        self.beside.append(self.saving_now())
        if len(self.ends) == 1:
            self.asked = now
        if self.save_every_s is None or now - self.asked < self.save_every_s:
            return Signal()
        self.asked = now
        return Signal(save=True)


def prepare(folder: Path, options: argparse.Namespace):
    """Data, a random language model, and the finished prepare stage; (experiment, store, how to make a task)."""
    folder.mkdir(parents=True)
    script = [sys.executable, str(ROOT / "experiments" / "digits.py"), "--output", str(folder / "data")]
    subprocess.run([*script, "--share", "0.1", "--seed", "0"], check=True)
    config = Qwen2Config(
        vocab_size=512, hidden_size=options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64, num_key_value_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "language")
    (folder / "experiment.yaml").write_text(
        YAML.format(
            tokenizer="tiny-bpe", data=folder / "data", steps=options.steps, tokens=options.tokens,
            cpus=os.cpu_count(),
        )
    )  # fmt: skip
    experiment = load_spec(folder / "experiment.yaml")
    store = open_store(experiment.storage)
    identities, plans = plan_experiment(experiment, store)
    by_name = {item.name: item for item in plans}

    def job(name: str) -> Job:
        stage, identity = experiment.stages[name], identities[name]
        parents = {need: by_name[need].prefix for need in stage.params.needs}
        return Job(experiment, stage, identity, fingerprint(identity), by_name[name].prefix, parents)

    def run_prepare(task: Task, stopping) -> None:
        io = StoreIO(task, mapper=lambda function, items, resources: map(function, items))
        KINDS["prepare"].run(io)
        io.close()

    run_stage(store, job("text_data"), run_prepare, lambda *event: print(*event))
    trained, numbers = job("language_pretrain"), count()

    def task(prefix: str = "") -> Task:
        """A new attempt, of a new stage unless a prefix is given."""
        prefix = prefix or f"stages/train/{next(numbers):016x}"
        ledger, params = Ledger(store, prefix), trained.stage.params
        token = ledger.start_attempt(ledger.claim({"host": socket.gethostname()}), 1)
        made = Task(
            store.url, prefix, trained.stage.name, "language_pretrain", trained.fingerprint, params, experiment.model,
            experiment.data, parent_refs(store, trained), token, keep=99,
        )  # fmt: skip
        io = StoreIO(made, mapper=map)
        KINDS["language_pretrain"].prepare(io)
        io.close()
        return made

    return store, task


def alone(function: Callable, *arguments):
    """The function's result and its peak memory in GB, from a process of its own: DeepSpeed never lets a model go."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_in_group, function, *arguments).result()


def _in_group(function: Callable, *arguments):
    torch.set_num_threads(os.cpu_count() or 1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    dist.init_process_group("gloo")
    return function(*arguments), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def train(task: Task, variant: str, save_every_s: float) -> tuple[list[float], list[float], list[bool]]:
    """When every step ended, the stall of every save, and which steps had a save beside them; seconds."""
    io = TimedIO(task, None if variant == "none" else save_every_s)
    trainer = Trainer(io)
    saver = trainer.saver = SAVERS[variant](io, trainer.engine)
    io.saving_now = lambda: any(work is not None for work in (saver._copy, saver._upload, saver._commit))
    io.complete = lambda *_, **__: None  # the result is not what is measured
    trainer.finish = lambda *_: None
    trainer.run()
    io.close()
    return io.ends, [stall for stall in io.stalls if stall > 0], io.beside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    store, task = prepare(options.folder, options)
    figures: dict[str, list[dict]] = {name: [] for name in SAVERS}
    last = ""
    for number in range(options.rounds):
        for variant in list(SAVERS) if number % 2 == 0 else list(SAVERS)[::-1]:
            made = task()
            (ends, saves, beside), peak = alone(train, made, variant, options.save_every)
            seconds, steps = ends[-1] - ends[0], [after - before for before, after in pairwise(ends)]
            alone_s = median(s for s, flag in zip(steps, beside[1:], strict=True) if not flag)
            extra = sum(s - alone_s for s, flag in zip(steps, beside[1:], strict=True) if flag)
            size = sum(store.size(key) for key in store.list(f"{made.prefix}/checkpoints/"))
            run = {"seconds": seconds, "stalls": saves, "bytes": size, "peak_memory_gb": peak, "steps": steps,
                   "beside": beside[1:], "within": extra / seconds}  # fmt: skip
            figures[variant].append(run)
            print(f"round {number} {variant}: {json.dumps(run)}", flush=True)
            if variant == "behind":
                last = made.prefix
            else:
                shutil.rmtree(options.folder / "storage" / made.prefix)
    base = median(run["seconds"] for run in figures["none"])
    report = {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores", "seed": 0, "options": {k: str(v) for k, v in vars(options).items()},
        "peak_memory_gb": {name: max(run["peak_memory_gb"] for run in runs) for name, runs in figures.items()},
    }  # fmt: skip
    for variant in ("behind", "synchronous"):
        runs = figures[variant]
        stall = sum(sum(run["stalls"]) for run in runs) / sum(run["seconds"] for run in runs)
        slow = median(run["seconds"] for run in runs) / base - 1
        within = median(run["within"] for run in runs)
        report[variant] = {"saves": [len(run["stalls"]) for run in runs], "stall": stall, "slowdown": slow,
                           "slowdown_within_run": within,
                           "stall_s": median(s for run in runs for s in run["stalls"])}  # fmt: skip
    report["resume_s"] = alone(resume_times, task(last))[0]
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report | {"runs": figures}, indent=1))
    behind = report["behind"]
    holds = behind["stall"] <= MOST and behind["slowdown"] <= MOST
    print(
        f"{'holds' if holds else 'FAILS'}: stall {behind['stall']:.2%}, slowdown {behind['slowdown']:.2%} of {MOST:.0%}"
    )
    return 0 if holds else 1


def resume_times(made: Task) -> dict[str, list[float]]:
    """Seconds to load, and to have the first row, from the oldest and from the newest checkpoint."""
    out = {}
    io = TimedIO(made, None)
    trainer = Trainer(io)
    names = io.checkpoints()
    for name in (names[-1], names[0], names[-1], names[0]):
        io.checkpoints = lambda name=name: [name]
        before = time.perf_counter()
        step = trainer.resume()
        rows = trainer.rows(step)
        next(rows)
        out.setdefault(f"step {step}", []).append(time.perf_counter() - before)
        rows.close()
    return out


if __name__ == "__main__":
    sys.exit(main())
