"""One loop for every training stage: text pre-training, MLP warmup, ViT incremental learning, full finetune.

Invariants: the data cursor is the step, nothing else; every rank runs ceil(G/world) micro-steps, missing packs are
rows of weight zero; whatever all ranks must agree on (loss, counts, save, stop) travels in one all-reduce per step;
every stage starts a fresh optimizer, as the official recipe does (recipe: arXiv 2412.05271 §3.2, Table 3).
"""

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modeling.batches import Batch, Batcher, Counts, empty_batch
from modeling.checkpoint import FragmentReader, write_fragments
from modeling.engine import Engine
from modeling.epochs import StepPlan
from modeling.errors import DataError
from modeling.freeze import freeze_table, set_trainable
from modeling.internvl import TrainingLoss, build_model, load_model, save_model
from modeling.packing import balance
from modeling.presets import resolve
from modeling.schedule import learning_rate
from modeling.shards import ShardReader
from stages.errors import Diverged
from stages.io import Signal, StageIO
from stages.plan_packs import PLAN, Lengths, data_parent, parent, step_weight

AHEAD = 2  # rows decoded ahead of the training


class Trainer:
    def __init__(self, io: StageIO):
        self.io, self.params = io, io.params
        params, data, start = io.params, data_parent(io), parent(io, "train")
        torch.set_num_threads(max(1, int(params.resources.cpus)))
        resolved = resolve(io.model)
        self.tile_size = resolved.tile_size
        if start:
            self.model, self.tokenizer = load_model(start.folder)
            self.model = self.model.float()
        else:
            self.tokenizer = resolved.tokenizer()
            self.model = build_model(resolved, self.tokenizer, params.seed)
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
        self.loss = TrainingLoss(self.model, params.train, params.drop_path)
        self.engine = Engine(
            self.loss, names, setting=params.deepspeed, precision=params.precision, accumulation=self.micro_steps,
            weight_decay=params.weight_decay, betas=params.betas, eps=params.eps, max_grad_norm=params.max_grad_norm,
        )  # fmt: skip
        self.datasets = sorted(set(self.reader.index["dataset"]))
        self.lost = self.seen = 0

    def resume(self) -> int:
        """Load the newest committed checkpoint; the step to go on with."""
        point = self.io.resume_point()
        if point is None:
            return 0
        reader = FragmentReader(point.folder / item["name"] for item in point.manifest["files"])
        reader.load(self.engine.owned())
        self.engine.loaded(point.step)
        if self.io.rank == 0:
            self.io.log(f"resumed from the checkpoint of step {point.step}")
        return point.step

    def save(self, step: int) -> None:
        """Every rank writes its fragments; rank 0 commits when all digests are in."""
        name = f"shard-{self.io.rank:05d}-of-{self.io.world:05d}.safetensors"
        path = self.io.scratch / name
        write_fragments(path, self.engine.to_write())
        mine = self.io.put_shard(step, name, path)
        path.unlink()
        files: list = [None] * self.io.world
        dist.all_gather_object(files, mine)
        if self.io.rank == 0:
            self.io.flush(step)
            self.io.commit(step, files, {"world": self.io.world, "zero": self.engine.zero})
        dist.barrier()

    def rows(self, first: int):
        """This rank's micro-batches from step `first` on, decoded ahead: yields (batch, seconds waited for it)."""
        places = ((step, pack) for step in range(first, self.plan.steps) for pack in self._mine(step))
        token: Any = self.tokenizer.eos_token_id

        def build(place) -> Batch:
            step, pack = place
            return empty_batch(token, self.depth) if pack is None else self.batcher.batch(step, pack)

        with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
            pending = []
            for place in places:
                pending.append(pool.submit(build, place))
                if len(pending) > AHEAD:
                    yield self._wait(pending.pop(0))
            while pending:
                yield self._wait(pending.pop(0))

    @staticmethod
    def _wait(future) -> tuple[Batch, float]:
        before = time.perf_counter()
        return future.result(), time.perf_counter() - before

    def _mine(self, step: int) -> list:
        packs = self.plan.step(step)
        costs = [float(self.lengths.cost[self.plan.sample[pack]].sum()) for pack in packs]
        mine: list = [packs[i] for i in balance(costs, self.io.world)[self.io.rank]]
        return mine + [None] * (self.micro_steps - len(mine))

    def run(self) -> None:
        io, every, total = self.io, self.params.checkpoint.every, self.plan.steps
        first = self.resume()
        rows, signal, stall, loss = self.rows(first), Signal(), 0.0, math.nan
        for step in range(first, total):
            began, done = time.perf_counter(), step + 1
            summed, norm, lr = self.step(step, rows, signal)
            loss = summed["loss"]
            self.check_lost(summed)
            if io.rank == 0:
                signal = io.tick(done, total, self.row(step, summed, norm, lr, time.perf_counter() - began, stall))
            stall = 0.0
            if (done % every == 0 or summed["save"] or summed["stop"]) and done < total:
                before = time.perf_counter()
                self.save(done)
                stall = time.perf_counter() - before
            if summed["stop"] and done < total:
                io.stopped(done)
        self.finish(total, loss)

    def step(self, step: int, rows: Iterator, signal: Signal) -> tuple[dict[str, float], float | None, float]:
        """All micro-steps of one optimizer step: (what the ranks share, gradient norm, learning rate).

        Raises Diverged on every rank where the loss or the gradient norm is not finite.
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
                if not math.isfinite(summed["loss"]):
                    raise Diverged(step + 1, "loss", summed["loss"], ids)
            norm = self.engine.step(lr)
        if norm is not None and not math.isfinite(norm):
            raise Diverged(step + 1, "gradient norm", norm, ids)
        return summed, norm, lr

    def exchange(self, loss: float, counts: Counts, signal: Signal, waited: float) -> dict[str, float]:
        """One all-reduce (float64 sum) for all that ranks share about a step."""
        mine = {
            "loss": loss, "samples": counts.samples, "tokens": counts.tokens, "supervised": counts.supervised,
            "tiles": counts.tiles, "lost": counts.lost, "checksum": counts.checksum, "save": float(signal.save),
            "stop": float(signal.stop), "wait": waited / self.io.world,
        } | {f"data/consumed/{name}": counts.per_dataset.get(name, 0) for name in self.datasets}  # fmt: skip
        vector = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(vector)
        return dict(zip(mine, vector.tolist(), strict=True))

    def row(self, step: int, summed: dict, norm, lr: float, seconds: float, stall: float) -> dict:
        """One line of metrics.jsonl, under the names of the field's common tools."""
        params, packs = self.params, self.plan.step(step)
        costs = [float(self.lengths.cost[self.plan.sample[pack]].sum()) for pack in packs]
        loads = [sum(costs[i] for i in rank) for rank in balance(costs, self.io.world)]
        return {
            "step": step + 1,
            "epoch": int(self.plan.epoch[packs[-1][-1]]),
            "loss": summed["loss"],
            "grad_norm": norm,
            "learning_rate": lr,
            "real_tokens_per_second": summed["tokens"] / seconds,
            "tokens_per_second_per_gpu": summed["tokens"] / seconds / self.io.world,
            "tiles_per_second": summed["tiles"] / seconds,
            "packing/token_fill": summed["tokens"] / (len(packs) * params.packing.max_tokens),
            "packing/tile_fill": summed["tiles"] / (len(packs) * params.packing.max_tiles),
            "balance/max_over_mean": max(loads) * len(loads) / sum(loads),
            "time/step": seconds,
            "time/data_wait": summed["wait"],
            "time/checkpoint_stall": stall,  # of the save between the step before and this one
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
        if self.io.rank == 0:
            folder = Path(self.io.scratch) / "model"
            save_model(self.model, self.tokenizer, folder, self.tile_size)
            self.io.complete(folder, {"steps": steps, "loss": loss, "world": self.io.world, "zero": self.engine.zero})
        dist.barrier()


def add_counts(total: Counts, more: Counts) -> None:
    for name in ("samples", "tokens", "supervised", "tiles", "lost", "checksum"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    for name, count in more.per_dataset.items():
        total.per_dataset[name] = total.per_dataset.get(name, 0) + count


def train(io: StageIO) -> None:
    """Train the stage from its resume point to its last step, inside an initialised process group."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    Trainer(io).run()
