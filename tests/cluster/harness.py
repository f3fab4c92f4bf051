"""A small experiment of its own folder, driven as users drive it: by the command `stageline`, as a process.

Invariant: only processes that a test started are ever signalled, by pid; every look at a result is a look at storage,
through the same readers that the product has.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from modeling.batches import sample_checksum
from modeling.epochs import StepPlan
from modeling.shards import ShardReader
from orchestrator.accounts import Account, account
from orchestrator.ledger import Entry, Ledger, StageState
from orchestrator.store import open_store

ROOT = Path(__file__).parents[2]
COMMAND = [str(Path(sys.executable).with_name("stageline"))]
SEED = int(os.environ.get("STAGELINE_TEST_SEED", "2026"))  # of the moments at which processes are killed
STEPS, EVERY = 100, 10  # of full_finetune: its steps, and those between two checkpoints
LONGER_STEPS = 400
LONGER = (f"stages.full_finetune.steps={LONGER_STEPS}",)  # overrides
PATIENCE_S = 900.0  # for one command, on a busy machine: only what hangs takes as long

# runs the command in a process that ends with 77 if it has loaded one of the heavy libraries
WITHOUT_RAY = """
import sys
from orchestrator.cli.main import main
code = main(sys.argv[1:])
heavy = {"ray", "deepspeed"}
if sys.argv[1] != "plan":  # which counts parameters on torch's meta device
    heavy |= {"torch", "transformers"}
sys.exit(77 if heavy & set(sys.modules) else code)
"""

YAML = """
name: cluster
storage: storage
seed: 0
model: {{vision: micro-vit, language: micro-qwen2}}
data:
  mix: {{meta: {data}/mix.json, system: ""}}
  heldout: {{meta: {data}/heldout.json, system: ""}}
defaults:
  global_batch: 8
  packing: {{max_tokens: 256, max_tiles: 48}}
  precision: fp32
  deepspeed: 1
  checkpoint: {{every: {every}, keep: 2}}
  resources: {{workers: 2, cpus: 1}}
stages:
  mix_data: {{kind: prepare, data: mix}}
  heldout_data: {{kind: prepare, data: heldout}}
  mlp_warmup: {{needs: [mix_data], steps: 4, lr: 1e-3}}
  full_finetune:
    needs: [mix_data, mlp_warmup]
    steps: {steps}
    lr: 5e-3
    drop_path: 0.1
    schedule: {{warmup: 4}}
  evaluate: {{needs: [heldout_data, full_finetune], resources: {{workers: 1}}}}
  export: {{needs: [full_finetune, evaluate]}}
"""


# defaults of an experiment whose stages are a few steps of one worker
SMALL = """
data:
  mix: {{meta: {data}/mix.json, system: ""}}
defaults:
  global_batch: 4
  packing: {{max_tokens: 256, max_tiles: 48}}
  precision: fp32
  resources: {{workers: 1, cpus: 1}}
"""


def make_data(folder: Path) -> Path:
    """Handwritten digits in all shapes (one tile, many tiles, two pictures, text), with fractional repeat factors."""
    script = [sys.executable, str(ROOT / "experiments" / "digits.py"), "--output", str(folder), "--share", "0.02"]
    subprocess.run([*script, "--seed", "0"], check=True)
    instructions = json.loads((folder / "instructions.json").read_text())
    text = json.loads((folder / "text.json").read_text())
    mix = {
        "digit": instructions["instructions_digit"] | {"repeat_time": 1.5},
        "row": instructions["instructions_row"] | {"repeat_time": 0.5},
        "larger": instructions["instructions_larger"] | {"repeat_time": 0.25},
        "words": text["text_words"] | {"repeat_time": 2},
    }
    (folder / "mix.json").write_text(json.dumps(mix))
    return folder


class Experiment:
    """`folder`/experiment.yaml with its storage beside it."""

    def __init__(self, folder: Path, data: Path, text: str = YAML):
        self.folder, self.data = folder, data
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.storage = folder / "experiment.yaml", folder / "storage"
        self.path.write_text(text.format(data=data, steps=STEPS, every=EVERY))

    def before_finetune(self, folder: Path) -> "Experiment":
        """The same experiment and storage elsewhere, as if it ended with full_finetune, and that had not run yet."""
        lines = self.path.read_text().splitlines()
        text = "\n".join(line for line in lines if not line.startswith(("  evaluate:", "  export:")))
        other = self._copy(folder, text)
        for stage in ("full_finetune", "evaluate", "export"):
            shutil.rmtree(other.prefix(stage))
            other._note(stage).unlink()
        return other

    def copy(self, folder: Path) -> "Experiment":
        """The same experiment elsewhere, with a copy of its storage."""
        return self._copy(folder, self.path.read_text())

    def _copy(self, folder: Path, text: str) -> "Experiment":
        other = Experiment(folder, self.data, text.replace("{", "{{").replace("}", "}}"))
        shutil.copytree(self.storage, other.storage)
        return other

    def _note(self, stage: str) -> Path:
        return self.storage / "experiments" / "cluster" / "stages" / f"{stage}.json"

    # -- commands ------------------------------------------------------------------------------------

    def command(self, verb: str, *arguments: str, prefix: list[str] | None = None) -> subprocess.CompletedProcess:
        """Runs to its end; output and errors as text, and told to pytest."""
        command = [*(prefix or COMMAND), verb, str(self.path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        print(f"$ stageline {verb} {' '.join(arguments)}  -> {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def run(self, *overrides: str) -> subprocess.CompletedProcess:
        """`stageline run` that has to succeed."""
        done = self.command("run", *overrides)
        assert done.returncode == 0, done.stderr
        return done

    def without_ray(self, verb: str, *arguments: str) -> subprocess.CompletedProcess:
        """A command that has to do without Ray, and but for plan without torch."""
        done = self.command(verb, *arguments, prefix=[sys.executable, "-c", WITHOUT_RAY])
        assert done.returncode != 77, "a heavy library was imported"
        return done

    def start(self, *overrides: str, environment: dict[str, str] | None = None) -> "Driver":
        return Driver(self, overrides, environment or {})

    # -- storage -------------------------------------------------------------------------------------

    def prefix(self, stage: str) -> Path:
        """The stage's folder, by what the experiment last called so."""
        note = json.loads(self._note(stage).read_text())
        (folder,) = self.storage.glob(f"stages/*/{note['fingerprint'][:16]}")
        return folder

    def ledger(self, stage: str) -> Ledger:
        return Ledger(open_store(str(self.storage)), self.prefix(stage).relative_to(self.storage).as_posix())

    def entries(self, stage: str) -> list[Entry]:
        return self.ledger(stage).entries()

    def state(self, stage: str) -> StageState:
        return self.ledger(stage).state()

    def account(self, stage: str) -> Account:
        return account(self.entries(stage))

    def logs(self, stage: str) -> dict[str, str]:
        """Log texts by name."""
        return {path.name: path.read_text() for path in sorted((self.prefix(stage) / "logs").iterdir())}

    def result(self, stage: str) -> Path:
        completed = self.state(stage).completed
        assert completed is not None, f"{stage} is not completed"
        return self.storage / completed["manifest"]["folder"]

    def weights(self, stage: str = "full_finetune") -> str:
        """sha256 of the stage's final weights."""
        return hashlib.sha256((self.result(stage) / "model.safetensors").read_bytes()).hexdigest()

    def rows(self, stage: str = "full_finetune") -> list[dict]:
        return [json.loads(line) for line in (self.prefix(stage) / "metrics.jsonl").read_text().splitlines()]

    def losses(self, stage: str = "full_finetune") -> np.ndarray:
        return np.array([row["loss"] for row in self.rows(stage)])

    def plan(self, stage: str = "full_finetune") -> StepPlan:
        return StepPlan.load(self.prefix(stage) / "plan.npz")

    def reader(self) -> ShardReader:
        return ShardReader(self.result("mix_data"))


class Driver:
    """A running `stageline run`, its output in a file."""

    def __init__(self, experiment: Experiment, overrides: tuple[str, ...], environment: dict[str, str]):
        self.experiment = experiment
        self.output_path = experiment.folder / f"output-{time.monotonic_ns()}.txt"
        with self.output_path.open("wb") as file:
            self.process = subprocess.Popen(
                [*COMMAND, "run", str(experiment.path), *overrides],
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | environment,
                # a shell lets its background jobs ignore Ctrl-C, and these tests may be one
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.ended = float("nan")  # when wait() saw its end, by time.monotonic()
        self._seen: dict[psutil.Process, str] = {}  # to its name when it was last seen

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def descendants(self) -> list[psutil.Process]:
        """All processes below the driver that were ever seen here and still run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._seen[child] = child.name()
        return [child for child in self._seen if runs(child)]

    def names(self) -> list[str]:
        """Of those."""
        return list(self._seen.values())

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        return [child for child in self.descendants() if self._seen[child].startswith("ray::RayTrainWorker")]

    def wait_for_checkpoint(self, step: int, stage: str = "full_finetune") -> None:
        """Waits until the running attempt has committed a checkpoint of `step` or later; it still trains then."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            assert self.process.poll() is None, f"the driver ended early:\n{self.output}"
            self.descendants()
            with contextlib.suppress(FileNotFoundError):  # not claimed yet
                state = self.experiment.state(stage)
                assert state.completed is None, "it was faster than this test: give it more steps"
                if any(c.token == state.token and c.step >= step for c in state.checkpoints):
                    return
            time.sleep(0.02)
        raise AssertionError(f"no checkpoint of step {step} of {stage}:\n{self.output}")

    def wait_for_step(self, step: int, stage: str = "full_finetune") -> None:
        """Waits until the running attempt has trained `step`, as its progress note says."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            assert self.process.poll() is None, f"the driver ended early:\n{self.output}"
            self.descendants()
            with contextlib.suppress(FileNotFoundError):  # not claimed yet, or no step so far
                if json.loads((self.experiment.prefix(stage) / "progress.json").read_text())["step"] >= step:
                    return
            time.sleep(0.02)
        raise AssertionError(f"no step {step} of {stage}:\n{self.output}")

    def kill(self) -> None:
        """kill -9 of the driver; then everything it had started has to end by itself."""
        self.descendants()
        self.process.kill()
        self.process.wait()
        # these two miss their raylet only after a minute; they train nothing and hold no claim
        self.assert_no_orphans(but=("ray::DashboardAgent", "ray::RuntimeEnvAgent"))

    def terminate(self) -> int:
        """SIGTERM to the driver alone, as a batch system sends it; its exit code."""
        return self._ends_by(lambda: self.process.terminate())

    def interrupt(self) -> int:
        """SIGINT to the whole foreground group, as a terminal sends Ctrl-C; the driver's exit code."""
        return self._ends_by(lambda: os.killpg(self.process.pid, signal.SIGINT))  # it leads a group of its own

    def _ends_by(self, send: Callable[[], None]) -> int:
        self.descendants()
        send()
        code = self.wait()
        self.assert_no_orphans()
        return code

    def wait(self) -> int:
        until = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < until, f"the driver does not end:\n{self.output}"
            self.descendants()
            time.sleep(0.05)
        self.ended = time.monotonic()
        print(f"-> {self.process.returncode}\n{self.output}")
        return self.process.returncode

    def assert_no_orphans(self, within_s: float = 20.0, but: tuple[str, ...] = ()) -> None:
        until = time.monotonic() + within_s
        while left := [f"{name} {child.pid}" for child, name in self._seen.items() if name not in but and runs(child)]:
            assert time.monotonic() < until, f"orphans: {left}"
            time.sleep(0.1)

    def end(self) -> None:
        """At the end of a test that failed: nothing of ours goes on."""
        for process in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            process.kill()
        self.process.wait()
        for child in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- what must hold of every finished training stage -----------------------------------------------------


def assert_lineage(experiment: Experiment) -> None:
    """The surviving rows are those of one undisturbed run of the plan: every step once, with its own samples."""
    rows, plan, reader = experiment.rows(), experiment.plan(), experiment.reader()
    ids, names = reader.index["id"], reader.index["dataset"]
    assert [row["step"] for row in rows] == list(range(1, plan.steps + 1))
    for row in rows:
        step = row["step"] - 1
        samples = [int(plan.sample[o]) for pack in plan.step(step) for o in pack]
        first = step * plan.global_batch
        assert row["data/packs"] == [first, first + len(plan.step(step))]
        assert row["data/samples"] == len(samples)
        assert row["data/checksum"] == sum(sample_checksum(ids[i]) for i in samples)
        consumed = Counter(names[i] for i in samples)
        assert {name: row[f"data/consumed/{name}"] for name in set(names)} == {n: consumed[n] for n in set(names)}
        assert row["data/lost"] == 0


def assert_repeats(experiment: Experiment) -> int:
    """In each epoch that was trained to its end every sample came as often as its repeat factor says.

    Returns the number of those epochs.
    """
    plan, reader = experiment.plan(), experiment.reader()
    names, factors = np.asarray(reader.index["dataset"]), np.asarray(reader.index["repeat"])
    trained = np.concatenate([np.asarray(pack) for step in range(plan.steps) for pack in plan.step(step)])
    assert len(set(trained.tolist())) == len(trained), "an occurrence was trained twice"
    whole = [e for e in np.unique(plan.epoch) if np.isin(np.flatnonzero(plan.epoch == e), trained).all()]
    for epoch in whole:
        times = np.bincount(plan.sample[trained[plan.epoch[trained] == epoch]], minlength=len(reader))
        assert ((times == np.floor(factors)) | (times == np.floor(factors) + 1)).all()
        for name in np.unique(names):
            members = names == name
            (factor,) = set(factors[members].tolist())
            assert times[members].sum() == np.floor(factor * members.sum() + 0.5), name
            if factor == int(factor):
                assert (times[members] == factor).all(), name
    return len(whole)
