"""One loop for every training stage: text pre-training, MLP warmup, ViT incremental learning, full finetune.

Invariants: the data cursor is the step, nothing else; every rank runs ceil(G/world) micro-steps, missing packs are
rows of weight zero; whatever all ranks must agree on (loss, counts, save, stop) travels in one all-reduce per step; a
step whose loss or gradient is not finite changes no weight on any rank, and its samples are told; every stage starts a
fresh optimizer, as the official recipe does (recipe: arXiv 2412.05271 §3.2, Table 3).
"""

import json
import math
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modeling.batches import Batch, Batcher, Counts, empty_batch
from modeling.checkpoint import FragmentReader
from modeling.engine import Engine
from modeling.epochs import StepPlan
from modeling.errors import CheckpointError, DataError
from modeling.estimate import measure, peak_flops, step_flops
from modeling.freeze import freeze_table, set_trainable
from modeling.internvl import TrainingLoss, build_model, load_model, save_model, start_from, take_language, take_vision
from modeling.loading import Rows, warm_up
from modeling.packing import balance
from modeling.presets import resolve
from modeling.schedule import learning_rate
from modeling.shards import ShardReader
from modeling.template import DEFAULT_SYSTEM
from modeling.zero import zero_stage
from stages.errors import Diverged
from stages.io import ResumePoint, Signal, StageIO
from stages.plan_packs import PLAN, Lengths, data_parent, parent, step_weight
from stages.recompute import checkpointed
from stages.saving import Saver
from stages.watchdog import Watchdog

TRAINED = "trained.json"  # beside the weights: `Trainer.about`


class Trainer:
    def __init__(self, io: StageIO):
        self.io, self.params = io, io.params
        params, data, start = io.params, data_parent(io), parent(io, "train")
        torch.set_num_threads(max(1, int(params.resources.cpus)))
        if params.decoders:
            warm_up()  # while the model is built
        resolved = resolve(io.model, weights=not start)
        self.tile_size = resolved.tile_size
        if start:
            self.model, self.tokenizer = load_model(start.folder)
            self.model = self.model.float()
        else:
            self.tokenizer = resolved.tokenizer()
            if resolved.whole:
                self.model = start_from(resolved.whole, self.tokenizer)
            else:
                self.model = build_model(resolved, self.tokenizer, params.seed)
            if params.vision_from:
                take_vision(self.model, io.inputs[params.vision_from].folder)
            if params.language_from:
                take_language(self.model, self.tokenizer, io.inputs[params.language_from].folder)
        set_trainable(self.model, params.train)
        if io.rank == 0:
            for line in freeze_table(self.model).splitlines():
                io.log(line)
        self.reader = ShardReader(data.folder)
        self.plan = StepPlan.load(io.fetch(PLAN))
        per_tile = self.model.config.image_seq_length
        self.lengths = Lengths.of(self.reader, params.loss.weight, params.loss.unit, per_tile)
        vision: Any = self.model.config.vision_config
        depth = vision.num_hidden_layers if params.drop_path and "vit" in params.train else 0
        self.batcher = Batcher(
            self.reader, self.plan, self.tokenizer, tile_size=self.tile_size, tokens_per_tile=per_tile,
            system=io.sources[data.params["data"]].system, reduction=params.loss.weight, unit=params.loss.unit,
            seed=params.seed, depth=depth, tile_tie=data.params["tile_tie"],
        )  # fmt: skip
        self.depth = depth
        self.micro_steps = math.ceil(params.global_batch / io.world)
        names = {p: name for name, p in self.model.named_parameters()}
        self.sizes = measure(self.model)  # before ZeRO 3 takes it apart
        recomputed = checkpointed(self.model, params, zero_stage(params.deepspeed))
        if io.rank == 0:
            io.log(f"layers that run again in the backward pass: {' and '.join(recomputed) or 'none'}")
        fused = params.fused and torch.cuda.is_available()
        self.loss = TrainingLoss(self.model, params.train, params.drop_path, recomputed, fused=fused)
        self.engine = Engine(
            self.loss, names, setting=params.deepspeed, precision=params.precision, accumulation=self.micro_steps,
            weight_decay=params.weight_decay, betas=params.betas, eps=params.eps, max_grad_norm=params.max_grad_norm,
        )  # fmt: skip
        self.loss.always_vision = self.engine.zero == 3
        name = torch.cuda.get_device_name() if self.engine.device.type == "cuda" else "cpu"
        self.peak_flops = peak_flops(name, params.precision)
        if self.engine.zero != zero_stage(params.deepspeed) and io.rank == 0:
            io.log(f"bf16 runs as ZeRO {self.engine.zero}, not {zero_stage(params.deepspeed)}")
        self.datasets = self.reader.index["dataset"].codes()[1]
        self.saver = Saver(io, self.engine)
        self.train_s = 0.0  # of the steps since the last snapshot
        self.settled = 0.0  # seconds that the newest step waited for a snapshot
        self.lost = self.seen = 0
        self.skipped = self.skipped_in_row = 0  # steps that were not finite

    def resume(self) -> int:
        """Load the newest committed checkpoint that every rank can read; the step to go on with."""
        point = self.resume_point()
        if point is None:
            return 0
        reader = FragmentReader(point.folder / item["name"] for item in point.manifest["files"])
        reader.load(self.engine.owned())
        self.skipped = point.manifest.get("skipped", 0)
        self.skipped_in_row = point.manifest.get("skipped_in_row", 0)
        self.engine.loaded(point.step - self.skipped)
        if self.io.rank == 0:
            self.io.log(f"resumed from the checkpoint of step {point.step}")
        return point.step

    def resume_point(self) -> ResumePoint | None:
        """One that is damaged, for whichever rank, is told, and the one before it is tried by all."""
        names: list = [self.io.checkpoints() if self.io.rank == 0 else None]
        dist.broadcast_object_list(names, device=self.engine.device)
        for name in names[0]:
            point, problem = None, None
            try:
                point = self.io.load(name)
            except CheckpointError as error:
                problem = str(error)
            problems: list = [None] * self.io.world
            dist.all_gather_object(problems, problem)
            told = next((text for text in problems if text is not None), None)
            if told is None:
                return point
            if self.io.rank == 0:
                self.io.log(f"checkpoint {name} cannot be used, trying the one before: {told}")
        return None

    def save(self, step: int) -> float:
        """Begin a save, which goes on behind the training; for how long it stood still so far, in seconds."""
        meta = {"world": self.io.world, "zero": self.engine.zero}
        meta |= {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        train_s, self.train_s = self.train_s, 0.0
        return self.saver.start(step, meta, train_s)

    def rows(self, first: int) -> Generator[tuple[Batch, float], None, None]:
        """This rank's micro-batches from step `first` on, decoded ahead: (batch, seconds waited for it)."""
        token: Any = self.tokenizer.eos_token_id
        empty = empty_batch(token, self.depth)
        packs = ((step, pack) for step in range(first, self.plan.steps) for pack in self._mine(step))
        requests = (empty if pack is None else self.batcher.request(step, pack) for step, pack in packs)
        return Rows(self.batcher.builder, self.params.decoders).ahead(requests)

    def _mine(self, step: int) -> list:
        packs = self.plan.step(step)
        costs = self.lengths.costs(self.plan, packs)
        mine: list = [packs[i] for i in balance(costs, self.io.world)[self.io.rank]]
        return mine + [None] * (self.micro_steps - len(mine))

    def run(self) -> None:
        io, total = self.io, self.plan.steps
        first = self.resume()
        signal, stall, loss, stopped = Signal(), 0.0, math.nan, 0
        with closing(self.rows(first)) as rows, Watchdog(self.params.hang_timeout_s, io.hung) as watchdog:
            for step in range(first, total):
                began, done = time.perf_counter(), step + 1
                summed, norm, lr = self.step(step, rows, signal)
                loss = summed["loss"] if math.isfinite(summed["loss"]) else loss
                seconds = time.perf_counter() - began
                self.train_s += seconds - self.settled
                watchdog.beat()
                self.check_lost(summed)
                if summed["uploaded"] == io.world:
                    self.saver.gather()
                if io.rank == 0:
                    signal = io.tick(done, total, self.row(step, summed, norm, lr, seconds, stall + self.settled))
                stall = 0.0
                if done < total and (summed["save"] or summed["stop"]):
                    stall = self.save(done)
                if done < total and summed["stop"]:
                    stopped = done
                    break
        self.saver.finish()
        if stopped:
            io.stopped(stopped)
        self.finish(total, loss)

    def step(self, step: int, rows: Iterator, signal: Signal) -> tuple[dict[str, float], float | None, float]:
        """All micro-steps of one optimizer step: (what the ranks share, gradient norm, learning rate).

        Raises Diverged on every rank at the `max_skipped`-th step in a row that is not finite.
        """
        params, schedule = self.params, self.params.schedule
        horizon = schedule.horizon or self.plan.steps
        lr = learning_rate(step, params.lr, schedule.warmup, horizon, params.lr * schedule.min_lr_ratio)
        weight = step_weight(self.plan, self.lengths, step) or 1.0
        local, waited, counts, ids = 0.0, 0.0, Counts(), []
        summed: dict[str, float] = {}
        norm = None
        for micro in range(self.micro_steps):
            batch, wait = next(rows)
            loss = self.engine.engine(batch.to(self.engine.device)) / weight
            local, waited = local + float(loss.detach()), waited + wait
            add_counts(counts, batch.counts)
            ids += batch.ids
            self.engine.backward(loss)
            if micro == self.micro_steps - 1:  # known to all before any weight is touched
                summed = self.exchange(local, counts, signal, waited)
                self.settled = self.saver.settle()
            norm = self.engine.step(lr, skip=bool(summed) and not math.isfinite(summed["loss"]))
        finite = math.isfinite(summed["loss"]) and (norm is None or math.isfinite(norm))
        if not finite:
            self.skip(step, summed["loss"], norm, local, ids)
        else:
            self.skipped_in_row = 0
        return summed, norm, lr

    def skip(self, step: int, loss: float, norm: float | None, local: float, ids: list[str]) -> None:
        """All ranks: a step that is not finite has changed nothing; tell what is needed to find the cause."""
        self.skipped += 1
        self.skipped_in_row += 1
        shares: list = [None] * self.io.world
        dist.all_gather_object(shares, (local, ids))
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm or math.nan)
        worst = [names for part, names in shares if not math.isfinite(part)] or [names for _, names in shares]
        suspects = [name for names in worst for name in names]
        if self.io.rank == 0:
            self.io.log(
                f"step {step + 1} skipped, {self.skipped_in_row} in a row: {what} is {value}; loss by rank "
                f"{[part for part, _ in shares]}; samples {', '.join(suspects)}"
            )
        if self.skipped_in_row >= self.params.max_skipped:
            raise Diverged(step + 1, what, value, suspects)

    def exchange(self, loss: float, counts: Counts, signal: Signal, waited: float) -> dict[str, float]:
        """One all-reduce (float64 sum) for all that ranks share about a step."""
        mine = {
            "loss": loss, "samples": counts.samples, "tokens": counts.tokens, "supervised": counts.supervised,
            "tiles": counts.tiles, "lost": counts.lost, "checksum": counts.checksum, "save": float(signal.save),
            "stop": float(signal.stop), "wait": waited / self.io.world, "uploaded": float(self.saver.uploaded()),
        } | {f"data/consumed/{name}": counts.per_dataset.get(name, 0) for name in self.datasets}  # fmt: skip
        vector = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(vector)
        return dict(zip(mine, vector.tolist(), strict=True))

    def row(self, step: int, summed: dict, norm, lr: float, seconds: float, stall: float) -> dict:
        """One line of metrics.jsonl, under the names of the field's common tools."""
        params, packs = self.params, self.plan.step(step)
        costs = self.lengths.costs(self.plan, packs)
        loads = [sum(costs[i] for i in rank) for rank in balance(costs, self.io.world)]
        flops = step_flops(
            self.sizes, params.train, tokens=summed["tokens"], supervised=summed["supervised"], tiles=summed["tiles"],
            squares=sum(float((self.lengths.of_pack(self.plan, pack)[0].astype(float) ** 2).sum()) for pack in packs),
        ) / seconds / self.io.world  # fmt: skip
        return {
            "step": step + 1,
            "epoch": int(self.plan.epoch[packs[-1][-1]]),
            "loss": finite(summed["loss"]),
            "grad_norm": finite(norm),
            "learning_rate": lr,
            "real_tokens_per_second": summed["tokens"] / seconds,
            "tokens_per_second_per_gpu": summed["tokens"] / seconds / self.io.world,
            "tiles_per_second": summed["tiles"] / seconds,
            "flops_per_second_per_gpu": flops,  # of what the stage differentiates
            **({"mfu": flops / self.peak_flops} if self.peak_flops else {}),
            "packing/token_fill": summed["tokens"] / (len(packs) * params.packing.max_tokens),
            "packing/tile_fill": summed["tiles"] / (len(packs) * params.packing.max_tiles),
            "balance/max_over_mean": max(loads) * len(loads) / sum(loads),
            "time/step": seconds,
            "time/data_wait": summed["wait"],
            "time/checkpoint_stall": stall,  # of the save between the step before and this one
            "skipped": self.skipped,
            "data/packs": [step * params.global_batch, step * params.global_batch + len(packs)],
            "data/samples": int(summed["samples"]),
            "data/checksum": int(summed["checksum"]),
            "data/lost": int(summed["lost"]),
            "tokens": int(summed["tokens"]),
            "supervised_tokens": int(summed["supervised"]),
            "tiles": int(summed["tiles"]),
            **{key: int(value) for key, value in summed.items() if key.startswith("data/consumed/")},
        }

    def check_lost(self, summed: dict[str, float]) -> None:
        self.seen += int(summed["samples"])
        self.lost += int(summed["lost"])
        if self.lost > max(1.0, self.params.max_lost * self.seen):
            raise DataError(
                f"{self.lost} of {self.seen} samples could not be decoded (max_lost {self.params.max_lost})",
                where=f"stages.{self.io.stage}", remedy="run prepare again on the sources, or raise max_lost",
            )  # fmt: skip

    def finish(self, steps: int, loss: float) -> None:
        """Rank 0 stores the model in Hugging Face layout: the stage's result."""
        state = self.engine.state_dict(self.model)
        if self.io.rank == 0:
            folder = Path(self.io.scratch) / "model"
            save_model(self.model, self.tokenizer, folder, self.tile_size, state)
            about = self.about(steps)
            system = self.io.sources[data_parent(self.io).params["data"]].system
            told = about | {"system": DEFAULT_SYSTEM if system is None else system}  # for export's chat template
            (folder / TRAINED).write_text(json.dumps(told, indent=1))
            summary = {"steps": steps, "loss": finite(loss), "world": self.io.world, "zero": self.engine.zero}
            self.io.complete(folder, summary | about, self.train_s)
        dist.barrier()

    def about(self, steps: int) -> dict[str, Any]:
        """What a scaling study has to know of the result: what this stage trained on, and parameters by module."""
        counts = self.sizes.parameters
        parameters = {"vision": counts["vit"], "mlp": counts["mlp"], "language": counts["language"]}
        seen = self.lengths.seen(self.plan)
        return {**seen, "steps": steps, "fraction": self.params.fraction, "parameters": parameters}


def finite(value: float | None) -> float | None:
    """None for what JSON cannot say."""
    return value if value is not None and math.isfinite(value) else None


def add_counts(total: Counts, more: Counts) -> None:
    for name in ("samples", "tokens", "supervised", "tiles", "lost", "checksum"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    for name, count in more.per_dataset.items():
        total.per_dataset[name] = total.per_dataset.get(name, 0) + count


def train(io: StageIO) -> None:
    """Train the stage from its resume point to its last step, inside an initialised process group."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    Trainer(io).run()
