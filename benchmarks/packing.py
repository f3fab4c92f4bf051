"""How full packs get, how fast, how even over ranks, and what planning the paper's 16.3 million samples takes.

    python benchmarks/packing.py [--full] [--output packing.json]

On the length distributions stated in benchmarks/lengths.py, with the product's own packer, plan of steps and dealing
to ranks. Aims: in all three mixtures no more rows than the official packer, no pack over a budget, 50,000 samples a
second on one core, max/mean over 64 ranks at most 1.04 (time of the slowest over time of the mean, over all steps, both
with 8 packs a rank and with one) without an order in the cost of steps; and the plan of 16.3 million samples
(--full; else 500,000 of them as a rehearsal) in less than ten minutes and 4 GB. Ends with 1 where one is missed.

The official packer is run with the recipe's buffer of 20, and with the dummy tile that it charges text samples; it
sees all samples in one worker here, where 512 GPUs with 8 workers would split them over 4,096 lists of buffers.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))

from lengths import TOKENS_PER_TILE, Mixture, mixtures, sft

from modeling import epochs
from modeling.epochs import StepPlan, plan_steps
from modeling.packing import balance, plan_packs
from modeling.ragged import Ragged
from stages.plan_packs import costs

RANKS = 64
PAPER = 16_300_000  # samples of the fine-tuning mixture, paper §4.1
BATCHES = (512, 64)  # packs a step: 8 a rank as the paper's batch on 64 ranks, and the paper's one a rank
SECONDS, GIGABYTES = 600, 4.0


def sums(packs: Ragged, values: np.ndarray) -> np.ndarray:
    return packs.sums(values[packs.values])


def packed(mixture: Mixture, seed: int, rounds: int) -> dict:
    """Rows of both packers beside the bound that no packer can beat, fill, speed."""
    arguments = mixture.tokens, mixture.tiles, mixture.max_tokens, mixture.max_tiles, seed
    seconds, packs = [], plan_packs(*arguments)
    for _ in range(rounds):
        began = time.perf_counter()
        plan_packs(*arguments)
        seconds.append(time.perf_counter() - began)
    charged = np.where(mixture.text, 1, mixture.tiles)  # a text sample brings a dummy tile in the official code
    official = len(plan_packs(mixture.tokens, charged, *arguments[2:], policy="official_first_fit"))
    tokens, tiles = sums(packs, mixture.tokens), sums(packs, mixture.tiles)
    return {
        "samples": len(mixture.tokens),
        "rows": len(packs),
        "official": official,
        "official, text without tile": len(plan_packs(*arguments, policy="official_first_fit")),
        "bound": float(max(tokens.sum() / mixture.max_tokens, tiles.sum() / mixture.max_tiles)),
        "token fill": float(tokens.mean() / mixture.max_tokens),
        "tile fill": float(tiles.mean() / mixture.max_tiles),
        "over budget": int((tokens > mixture.max_tokens).sum() + (tiles > mixture.max_tiles).sum()),
        "each once": bool((np.sort(packs.values) == np.arange(len(mixture.tokens))).all()),
        "samples/s": len(mixture.tokens) / median(seconds),
    }


def planned(mixture: Mixture, seed: int, global_batch: int, look_ahead: int) -> StepPlan:
    product, epochs.LOOK_AHEAD = epochs.LOOK_AHEAD, look_ahead
    try:
        return plan_steps(
            mixture.tokens, mixture.tiles, np.ones(len(mixture.tokens)),
            max_tokens=mixture.max_tokens, max_tiles=mixture.max_tiles, global_batch=global_batch, seed=seed, epochs=1,
            costs=costs(mixture.tokens, mixture.tiles, TOKENS_PER_TILE),
        )  # fmt: skip
    finally:
        epochs.LOOK_AHEAD = product


def balanced(mixture: Mixture, seed: int, global_batch: int, look_ahead: int, ranks: int = RANKS) -> dict:
    """How long ranks wait for the slowest, if time is as the costs; and whether steps come in an order of cost."""
    plan = planned(mixture, seed, global_batch, look_ahead)
    packs = Ragged(plan.sample[plan.packs.values], plan.packs.offsets)
    cost = sums(packs, costs(mixture.tokens, mixture.tiles, TOKENS_PER_TILE))
    text = sums(packs, np.where(mixture.text, mixture.tokens, 0)) / sums(packs, mixture.tokens)
    steps = len(packs) // global_batch  # the last one may be short
    slowest, mean = np.empty(steps), np.empty(steps)
    for step, of_step in enumerate(cost[: steps * global_batch].reshape(steps, global_batch)):
        loads = [of_step[rank].sum() for rank in balance(of_step, ranks)]
        slowest[step], mean[step] = max(loads), sum(loads) / ranks
    ratio = slowest / mean
    lags = [float(np.corrcoef(mean[:-lag], mean[lag:])[0, 1]) for lag in range(1, 9)]
    return {
        "global batch": global_batch,
        "ranks": ranks,
        "look-ahead": look_ahead,
        "steps": steps,
        "max/mean": float(slowest.sum() / mean.sum()),
        "median": float(np.median(ratio)),
        "p95": float(np.percentile(ratio, 95)),
        "p99": float(np.percentile(ratio, 99)),
        "worst": float(ratio.max()),
        "steps over 1.04": float((ratio > 1.04).mean()),
        "autocorrelation": max(lags, key=abs),
        # A look-ahead holds each level of cost once, so that neighbours differ: -1 / look-ahead is expected at lag 1.
        "allowed": 1 / look_ahead + 3 / steps**0.5,
        "noise": 3 / steps**0.5,
        "trend": float(np.corrcoef(np.arange(steps), mean)[0, 1]),
        "text share, deviation over steps": float(text[: steps * global_batch].reshape(steps, -1).mean(axis=1).std()),
    }


# -- the whole fine-tuning mixture, by the stage's own code from an index on disk ---------------------------------


def write_index(folder: Path, samples: int, seed: int) -> None:
    """An index as `prepare` leaves it: `samples` rows in 100 datasets; only its tars are missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from modeling.index import INDEX, SCHEMA
    from modeling.shards import ROW_GROUP

    def lists(lengths, values, kind) -> pa.Array:
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind.value_type))

    mixture, rng = sft(samples, seed), np.random.default_rng(seed)
    with pq.ParquetWriter(folder / INDEX, SCHEMA, compression="zstd") as writer:
        for start in range(0, samples, 16 * ROW_GROUP):
            rows = range(start, min(start + 16 * ROW_GROUP, samples))
            n, tiles = len(rows), mixture.tiles[start : rows.stop]
            pictures, turns = (tiles > 0).astype(np.int64), rng.integers(1, 4, n)
            few = np.full(pictures.sum(), 1000)
            columns = {
                "id": [f"sample-{i:09d}" for i in rows], "key": [f"{i % 100:03d}-{i:09d}" for i in rows],
                "dataset": [f"dataset-{i % 100:03d}" for i in rows], "task": [f"dataset-{i % 100:03d}" for i in rows],
                "shard": [f"{i // 500:06d}.tar" for i in rows], "file": [f"part-{i // 100_000}.jsonl" for i in rows],
                "tokens": mixture.tokens[start : rows.stop], "tiles": tiles, "augment": np.ones(n, bool),
                "max_tiles": np.full(n, 12), "repeat": np.ones(n), "line": np.arange(n), "json_crc32": np.arange(n),
                "answers": rng.integers(2, 400, turns.sum()), "tiles_per_image": tiles[tiles > 0],
                "frames": np.zeros(n), "min_frames": np.zeros(n), "frame_tokens": few[:0],
            }  # fmt: skip
            arrays = [
                lists(turns if name == "answers" else pictures * (name != "frame_tokens"), columns.get(name, few), kind)
                if pa.types.is_list(kind := SCHEMA.field(name).type)
                else pa.array(columns.get(name, np.full(n, 1000)), kind)
                for name in SCHEMA.names
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=ROW_GROUP)


def peak() -> float:
    """GB this process has held at most. (getrusage would begin with what its parent held.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def plan_stage(folder: Path, seed: int) -> dict:
    """In a process of its own: what the driver does before a stage, then what a rank holds of the plan."""
    from fake_io import FakeIO

    from modeling.shards import ShardReader
    from stages.io import Input
    from stages.params import DataParams, ModelParams, PrepareParams, TrainParams
    from stages.plan_packs import Lengths, plan_packs, step_weight

    params = TrainParams(train=("vit", "mlp", "language"), lr=4e-5, global_batch=512, epochs=1, seed=seed)
    data = Input("data", "prepare", "0" * 64, folder, PrepareParams(data="d").model_dump(mode="json"))
    model = ModelParams(vision="tiny-vit", language="tiny-qwen2", tile_size=128)  # 256 tokens a tile
    io = FakeIO(folder / "stage", params, model=model, sources={"d": DataParams(meta="-")}, inputs={"data": data})
    began, before = time.perf_counter(), peak()
    plan_packs(io)
    planned_s, planned_gb = time.perf_counter() - began, peak()
    began = time.perf_counter()
    plan = StepPlan.load(io.fetch("plan.npz"))
    lengths = Lengths.of(ShardReader(folder), "square", "conversation", TOKENS_PER_TILE)
    loaded_s = time.perf_counter() - began
    assert step_weight(plan, lengths, 0) > 0 and plan.step(plan.steps - 1)
    return {
        "samples": len(plan.sample), "steps": plan.steps, "log": io.lines[-1], "digest": plan.digest(),
        "plan s": planned_s, "plan peak GB": planned_gb, "GB before": before,
        "load s": loaded_s, "peak GB": peak(), "file GB": (io.kept / "plan.npz").stat().st_size / 1e9,
    }  # fmt: skip


def at_scale(samples: int, seed: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="packing-") as folder:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(write_index, (Path(folder), samples, seed))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(plan_stage, (Path(folder), seed))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=20_000, help="of the packing")
    parser.add_argument("--balance-samples", type=int, default=400_000, help="of the balance over ranks")
    parser.add_argument("--look-ahead", type=int, nargs="*", default=[1, 8], help="steps; beside the product's")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--full", action="store_true", help=f"plan {PAPER:,} samples")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    options = parser.parse_args()
    load, versions = f"load {os.getloadavg()[0]:.1f}", f"Python {platform.python_version()}, numpy {np.__version__}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {load}, {versions}"
    print(f"{machine}, seed {options.seed}", flush=True)
    out = SimpleNamespace(missed=[], figures={"machine": machine, "seed": options.seed})

    def aim(holds: bool, what: str) -> None:
        if not holds:
            out.missed.append(what)
            print(f"MISSED: {what}", flush=True)

    for mixture in mixtures(options.samples, options.seed):
        row = packed(mixture, options.seed, options.rounds)
        out.figures[mixture.name] = {"packing": row, "balance": []}
        print(
            f"\n{mixture.name}: {row['samples']:,} samples, {row['rows']:,} rows; official {row['official']:,} "
            f"({row['official, text without tile']:,} if text is charged no tile), bound {row['bound']:,.1f} "
            f"(+{row['rows'] / row['bound'] - 1:.2%}); token fill {row['token fill']:.1%}, tile fill "
            f"{row['tile fill']:.1%}, over budget {row['over budget']}; {row['samples/s']:,.0f} samples/s",
            flush=True,
        )
        least = min(row["official"], row["official, text without tile"])
        aim(row["rows"] <= least, f"{mixture.name}: {row['rows']} rows, official {least}")
        aim(row["over budget"] == 0 and row["each once"], f"{mixture.name}: over budget, or not every sample once")
        aim(row["samples/s"] >= 50_000, f"{mixture.name}: {row['samples/s']:,.0f} samples/s")

    print("\nmax/mean: time of the slowest rank over that of the mean, all steps; then of single steps")
    for mixture in mixtures(options.balance_samples, options.seed):
        for global_batch in BATCHES:
            for look_ahead in sorted({epochs.LOOK_AHEAD, *options.look_ahead}):
                row = balanced(mixture, options.seed, global_batch, look_ahead)
                out.figures[mixture.name]["balance"].append(row)
                print(told(mixture.name, row), flush=True)
                if look_ahead == epochs.LOOK_AHEAD:
                    where = f"{mixture.name}, {global_batch} packs a step"
                    aim(row["max/mean"] <= 1.04, f"{where}: max/mean {row['max/mean']:.4f}")
                    shuffled = abs(row["autocorrelation"]) <= row["allowed"] and abs(row["trend"]) <= row["noise"]
                    aim(shuffled, f"{where}: the cost of steps follows an order")
    row = balanced(sft(options.balance_samples, options.seed), options.seed, 512, epochs.LOOK_AHEAD, ranks=512)
    out.figures["512 ranks"] = row
    print(told("SFT as in the paper", row), flush=True)

    row = at_scale(PAPER if options.full else 500_000, options.seed)
    out.figures["scale"] = row
    print(f"\n{row['log']}\nplan.npz {row['file GB']:.2f} GB, sha256 of the plan {row['digest'][:16]}")
    print(
        f"planned in {row['plan s'] / 60:.1f} min ({row['samples'] / row['plan s']:,.0f} samples/s) with a peak of "
        f"{row['plan peak GB']:.2f} GB; plan, weights and costs loaded by a rank in {row['load s']:.1f} s; "
        f"peak of both {row['peak GB']:.2f} GB"
    )
    if options.full:
        aim(row["plan s"] <= SECONDS, f"planned in {row['plan s']:.0f} s")
    aim(row["peak GB"] <= GIGABYTES, f"peak of {row['peak GB']:.2f} GB")
    if options.output:
        options.output.write_text(json.dumps(out.figures | {"missed": out.missed}, indent=1) + "\n")
    return 1 if out.missed else 0


def told(name: str, row: dict) -> str:
    singles = ", ".join(f"{what} {row[what]:.4f}" for what in ("median", "p95", "p99", "worst"))
    return (
        f"{name}: {row['global batch']} packs on {row['ranks']} ranks, look-ahead {row['look-ahead']}, "
        f"{row['steps']:,} steps: max/mean {row['max/mean']:.4f}; {singles}, over 1.04 {row['steps over 1.04']:.1%}; "
        f"autocorrelation {row['autocorrelation']:+.3f} (within {row['allowed']:.3f}), trend {row['trend']:+.3f} "
        f"(within {row['noise']:.3f}), text share ±{row['text share, deviation over steps']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
