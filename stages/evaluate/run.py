"""Evaluate a trained stage on a prepared split: greedy answers, exact match, per task with 95 % intervals.

Every question of the split is asked; an answer that is not the reference to the letter is wrong. The answers are
stored, so that anyone can count again. Result: predictions.jsonl and scores.json.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.tiles import Tie
from stages.io import StageIO
from stages.plan_packs import data_parent, parent

Z = 1.959964  # two-sided 95 %
MAX_TILES = 512  # asked at once, where a question alone has no more: 1.2 GB of pixels at 448×448


def wilson(right: int, n: int) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, 1927): honest near 0 and 1, unlike the normal one."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


@dataclass(frozen=True)
class Part:
    """Rows of one task for one process."""

    model: str
    data: str
    rows: list[int]
    batch: int
    max_new_tokens: int
    system: str | None
    threads: int
    tile_tie: Tie = "strict"


def batches(rows: Sequence[int], tiles: Sequence[int], most: int, most_tiles: int) -> Iterator[list[int]]:
    """Rows in their order, at most so many and so many tiles together; what has more tiles is asked alone.

    tiles: of each row of the index.
    """
    batch: list[int] = []
    sum_tiles = 0
    for row in rows:
        count = int(tiles[row])
        if batch and (len(batch) == most or sum_tiles + count > most_tiles):
            yield batch
            batch, sum_tiles = [], 0
        batch.append(row)
        sum_tiles += count
    if batch:
        yield batch


def answer_part(part: Part) -> list[dict[str, Any]]:
    """The predictions of some rows, in their order."""
    import torch

    from modeling.generate import Question, answer, device
    from modeling.internvl import load_model
    from modeling.shards import ShardReader

    torch.set_num_threads(part.threads)
    model, tokenizer = load_model(part.model)
    model.to(device())  # pyright: ignore[reportArgumentType]
    config: Any = model.config
    reader, side = ShardReader(part.data), config.vision_config.image_size[0]
    out = []
    # neighbours of like length share a batch
    order = sorted(part.rows, key=lambda i: (int(reader.index["tokens"][i]), i))
    for chosen in batches(order, reader.index["tiles"], part.batch, MAX_TILES):
        questions, references = [], []
        for i in chosen:
            conversation, images = reader.sample(i, side)
            *turns, last = conversation
            video = bool(reader.index["frames"][i])
            questions.append(Question(turns, images, int(reader.index["max_tiles"][i]), part.tile_tie, video))
            references.append(last["value"])
        answers = answer(model, tokenizer, questions, system=part.system, max_new_tokens=part.max_new_tokens)
        for i, reference, given in zip(chosen, references, answers, strict=True):
            index = reader.index
            out.append({
                "id": index["id"][i], "task": index["task"][i], "answer": given, "reference": reference,
                "right": given == reference.strip(),
            })  # fmt: skip
    return sorted(out, key=lambda row: row["id"])


def score(predictions: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Exact match per task: {task: {n, right, accuracy, low, high}}."""
    tasks: dict[str, list[bool]] = {}
    for row in predictions:
        tasks.setdefault(row["task"], []).append(row["right"])
    scores = {}
    for task, marks in sorted(tasks.items()):
        low, high = wilson(sum(marks), len(marks))
        scores[task] = {
            "n": len(marks), "right": sum(marks), "accuracy": sum(marks) / len(marks), "low": low, "high": high,
        }  # fmt: skip
    return scores


def evaluate(io: StageIO) -> None:
    """Ask every question of the split (or the first `limit` of each task) and store answers and scores."""
    from modeling.shards import ShardReader

    params, data, trained = io.params, data_parent(io), parent(io, "train")
    assert trained is not None, "the spec lets no evaluation pass without a trained stage"
    tasks: dict[str, list[int]] = {}
    for i, task in enumerate(ShardReader(data.folder).index["task"]):
        tasks.setdefault(task, []).append(i)
    rows = [i for found in tasks.values() for i in found[: params.limit]]
    parts = [
        Part(
            str(trained.folder), str(data.folder), [int(i) for i in chunk], params.batch, params.max_new_tokens,
            io.sources[data.params["data"]].system, max(1, int(params.resources.cpus)),
            data.params["tile_tie"],
        )
        for chunk in np.array_split(np.array(rows), min(len(rows), params.resources.most))
    ]  # fmt: skip
    predictions: list[dict[str, Any]] = []
    for found in io.map(answer_part, parts):
        predictions += found
        io.tick(len(predictions), len(rows), {"answers": len(predictions)})
    scores = score(predictions)
    for task, row in scores.items():
        io.log(f"{trained.name} {task}: {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n={row['n']}")
    folder = io.scratch / "result"
    folder.mkdir()
    (folder / "predictions.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    )
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    io.complete(folder, {"stage": trained.name, "data": data.name, "scores": scores})
