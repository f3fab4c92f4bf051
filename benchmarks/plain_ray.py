"""The pattern that Ray documents for preemptions, on the training of a Stageline stage; chaos.py holds it beside ours.

Invariant: model, data, step and checkpoint format are those of the stage, and the settings are Ray's defaults; what
differs is who saves, when, and who counts it as saved. On a notice it saves once and trains on until the node is gone;
Ray then starts again from the checkpoint that was last reported (docstring of ray.train.get_preemption_info, 2.60).

    python benchmarks/plain_ray.py EXPERIMENT --address HOST:PORT --log FILE --results FOLDER [OVERRIDE ...]

The experiment's parents of full_finetune and its plan of packs must lie in its storage, a folder. Rank 0 appends to
the log one JSON line for every start ({"from": step, "world": workers}), step and save.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGE = "full_finetune"


@dataclass
class Stage:
    """What the training loop reads of its surroundings (stages.io.StageIO without saving)."""

    params: Any
    model: Any
    sources: dict[str, Any]
    inputs: dict[str, Any]
    plan: Path
    rank: int = 0
    world: int = 1
    stage: str = STAGE
    logged: list[str] = field(default_factory=list)

    def fetch(self, name: str) -> Path:
        return self.plan

    def log(self, message: str) -> None:
        self.logged.append(message)


def read_stage(path: str, overrides: list[str]) -> Stage:
    from orchestrator.driver import Job, parent_refs
    from orchestrator.plan import plan_experiment
    from orchestrator.spec import load_spec
    from orchestrator.store import open_store
    from stages.io import Input

    experiment = load_spec(path, overrides)
    store = open_store(experiment.storage)
    identities, plans = plan_experiment(experiment, store)
    by_name = {plan.name: plan for plan in plans}
    stage, plan = experiment.stages[STAGE], by_name[STAGE]
    parents = {need: by_name[need].prefix for need in stage.params.needs}
    job = Job(experiment, stage, identities[STAGE] or {}, plan.fingerprint or "", plan.prefix or "", parents)
    inputs = {}
    for ref in parent_refs(store, job):
        folder = store.local_path(ref.folder)
        assert folder is not None, "its storage is a folder"
        inputs[ref.name] = Input(ref.name, ref.kind, ref.fingerprint, folder, ref.params)
    packs = store.local_path(f"{plan.prefix}/plan.npz")
    assert packs is not None, "run the stage first: its plan of packs is used here"
    return Stage(stage.params, experiment.model, experiment.data, inputs, packs)


def train(config: dict[str, Any]) -> None:
    """Ray Train's own function of one worker."""
    import ray.train

    from modeling.checkpoint import FragmentReader, Snapshot
    from stages.io import Signal
    from stages.train import Trainer

    context = ray.train.get_context()
    stage: Stage = config["stage"]
    stage.rank, stage.world = context.get_world_rank(), context.get_world_size()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())

    def log(**line: Any) -> None:
        if stage.rank == 0:
            with open(config["log"], "a") as file:
                file.write(json.dumps(line | {"time": time.time()}) + "\n")

    trainer: Any = Trainer(stage)  # pyright: ignore[reportArgumentType]

    def save(step: int) -> None:
        fragments = trainer.engine.to_write()
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / f"shard-{stage.rank}.safetensors"
            shard.write_bytes(Snapshot(fragments).take(fragments))
            (Path(folder) / "step.json").write_text(json.dumps(step))
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        log(saved=step)

    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            first = json.loads((Path(folder) / "step.json").read_text())
            FragmentReader(Path(folder).glob("*.safetensors")).load(trainer.engine.owned())
        trainer.engine.loaded(first)
    rows, saved_on_preemption = trainer.rows(first), False
    for step in range(first, trainer.plan.steps):
        trainer.step(step, rows, Signal())
        if step == first:
            log(**{"from": first, "world": stage.world})
        log(step=step + 1)
        if ray.train.get_preemption_info() is not None and not saved_on_preemption:
            save(step + 1)
            saved_on_preemption = True
        elif (step + 1) % config["every"] == 0:
            save(step + 1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--address", required=True)
    parser.add_argument("--log", required=True, type=Path)
    parser.add_argument("--results", required=True, type=Path, help="Ray Train's own storage, a folder")
    options = parser.parse_args()
    stage = read_stage(options.experiment, options.overrides)

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=options.address, log_to_driver=False)
    TorchTrainer(
        train,
        train_loop_config={"stage": stage, "log": str(options.log), "every": stage.params.checkpoint.every},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=stage.params.resources.workers, resources_per_worker={"CPU": stage.params.resources.cpus}
        ),
        run_config=RunConfig(
            name="plain", storage_path=str(options.results), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
