"""Answers are generated once: parts of a pool, each one task on the cluster, kept in storage for whoever asks the same.

Invariants. A part is named by the SHA-256 of all that its answers depend on (checkpoint, what is asked, how it is
drawn), created whole or not at all, and never changed, so an evaluation that is killed goes on with the parts that are
there, one with another metric, threshold or re-ranker generates nothing anew, and the same pool gives the same figures.
Of two tasks that make the same part the first to store it is right. A killed task repeats its one part: about ROWS
answers. Bumping VERSION makes all parts anew.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from modeling.errors import DataError
from stages.evaluate import score
from stages.evaluate.ensemble import Rule
from stages.evaluate.items import Item
from stages.evaluate.questions import Asked, opened
from stages.io import Folder

VERSION = 2
ROWS = 128  # answers of a part
AT_ONCE = 2  # samples of a question, where it stops by itself
MAX_TILES = 512  # asked at once, where a question alone has no more: 1.2 GB of pixels at 448×448

Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A checkpoint. fingerprint: of what it is; open: gives its folder, in whatever process."""

    name: str
    fingerprint: str
    open: Callable[[], Path]


@dataclass(frozen=True)
class Part:
    """Questions for one task. do: a key of tasks.TASKS. settings: what the answers depend on besides. texts: of each
    question, what a judge reads. data: of the rows of prepared data. cache: where its answers go."""

    do: str
    model: Model
    questions: tuple[Asked, ...]
    settings: dict[str, Any]
    cache: Folder
    batch: int
    threads: int
    gpus: int = 0
    data: Callable[[], Path] | None = None
    texts: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        asked = [[one.key, one.content, one.text, one.system, one.frames, one.tiles, one.tile_tie]
                 for one in self.questions]  # fmt: skip
        told = [VERSION, self.do, self.model.fingerprint, asked, self.settings, self.texts]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest() + ".jsonl"


@dataclass(frozen=True)
class Made:
    """rows: of each question of the part, in order."""

    name: str
    rows: list[Any]


def parts_of(whole: Part, rows_each: int) -> Iterator[Part]:
    """Cut into parts of about ROWS answers, like lengths together. rows_each: answers of a question."""
    order = sorted(range(len(whole.questions)), key=lambda i: (whole.questions[i].size, i))
    most = max(1, ROWS // rows_each)
    for start in range(0, len(order), most):
        chosen = order[start : start + most]
        texts = tuple(whole.texts[i] for i in chosen) if whole.texts else ()
        yield replace(whole, questions=tuple(whole.questions[i] for i in chosen), texts=texts)


def batches(tiles: Sequence[int], most: int, most_tiles: int) -> Iterator[list[int]]:
    """Places in their order, at most so many and so many tiles together; what has more tiles is asked alone."""
    batch: list[int] = []
    sum_tiles = 0
    for i, count in enumerate(tiles):
        if batch and (len(batch) == most or sum_tiles + count > most_tiles):
            yield batch
            batch, sum_tiles = [], 0
        batch.append(i)
        sum_tiles += count
    if batch:
        yield batch


def encode(made: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode("utf-8", "surrogatepass")


def decode(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.decode("utf-8", "surrogatepass").split("\n") if line]


def until_settled(
    items: Sequence[Item], draw: Callable[[Sequence[int], Sequence[int]], list[list[Any]]], rule: Rule
) -> list[list[Any]]:
    """The samples of each question up to where its vote is settled: those that `ensemble.replay` would draw.

    draw(places, sample numbers): rows of sampling.Generation. They come AT_ONCE at a time, for each time reads the
    question again; what was drawn beyond the end of a vote is left out.
    """
    out: list[list[Any]] = [[] for _ in items]
    votes: list[list[str | None]] = [[] for _ in items]
    running = list(range(len(items)))
    for start in range(0, rule.maximum, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, rule.maximum))
        for i, row in zip(running, draw(running, numbers), strict=True):
            for one in row:
                if votes[i] and rule.done(votes[i]):
                    break
                answer = score.answer_of(items[i], one.text, one.cut)
                votes[i].append(None if answer is None else score.key_of(items[i], answer))
                out[i].append(one)
        running = [i for i in running if not rule.done(votes[i])]
        if not running:
            break
    return out


class Evaluator:
    """One per process: a model is loaded once for all parts that ask it."""

    def __init__(self) -> None:
        self._loaded: tuple[str, str, Any] | None = None

    def __call__(self, part: Part) -> Made:
        import torch

        torch.set_num_threads(part.threads)
        rows: list[Any] = []
        each = max(1, part.batch // max(1, len(part.settings.get("samples", ())) or 1))
        for chosen in batches([one.tiles for one in part.questions], each, MAX_TILES):
            rows += self._batch(part, chosen)
        data = encode(rows)
        if not part.cache.create(part.name, data):  # another task was faster: its answers are the pool's
            (data,) = part.cache.get([part.name])
        return Made(part.name, decode(data))

    def _batch(self, part: Part, chosen: Sequence[int]) -> list[Any]:
        from modeling import judging
        from modeling.generate import Question
        from stages.evaluate import rerank

        model, tokenizer, sampler = self._model(part)
        asked = [part.questions[i] for i in chosen]
        side = sampler.side if model is None else model.config.vision_config.image_size[0]
        questions: list[Question] = [opened(one, part.data, side) for one in asked]
        (system,) = {one.system for one in asked}
        if part.do in ("generate", "live"):
            how = {k: part.settings[k] for k in ("max_new_tokens", "temperature", "top_p", "samples", "seed")}

            def draw(places: Sequence[int], samples: Sequence[int]) -> list[list[Any]]:
                keys, out = [asked[i].key for i in places], [[] for _ in places]
                for start in range(0, len(samples), part.batch):  # a batch holds no more rows than it is asked to
                    some = how | {"samples": list(samples[start : start + part.batch])}
                    for row, more in zip(out, sampler([questions[i] for i in places], keys, system=system, **some)):
                        row += more
                _check_finite(part.model, out)
                return out

            if part.do == "live":
                found = until_settled([one.item for one in asked], draw, Rule(*part.settings["rule"]))
            else:
                found = draw(range(len(asked)), part.settings["samples"])
            return [[asdict(one) for one in row] for row in found]
        if part.do == "loss":
            answers = [one.item.references[0] for one in asked]
            return [list(one) for one in judging.answer_loss(model, tokenizer, questions, answers, system=system)]
        texts = [part.texts[i] for i in chosen]
        kind, prompt = part.settings["kind"], part.settings["prompt"]
        pairs = max(1, min(part.batch, MAX_TILES // max(1, *(one.tiles for one in asked))))
        return rerank.judged(kind, prompt, model, tokenizer, questions, texts, system=system, batch=pairs)

    def _model(self, part: Part) -> tuple[Any, Any, Any]:
        """(model, tokenizer, sampler); under vLLM, which has the weights itself, no model."""
        from functools import partial

        from modeling.generate import device
        from modeling.internvl import load_model
        from modeling.sampling import sample

        model, engine = part.model, part.settings.get("engine", "transformers")
        if self._loaded is None or self._loaded[:2] != (model.fingerprint, engine):
            self._loaded = None  # first, or two models lie in memory
            if engine == "vllm":
                from modeling.vllm_engine import VllmEngine

                found = VllmEngine(model.open(), tensor_parallel_size=max(1, part.gpus))
                self._loaded = (model.fingerprint, engine, (None, found.tokenizer, found))
            else:
                loaded, tokenizer = load_model(model.open())
                loaded.to(device())  # pyright: ignore[reportArgumentType]
                self._loaded = (model.fingerprint, engine, (loaded, tokenizer, partial(sample, loaded, tokenizer)))
        return self._loaded[2]


def _check_finite(model: Model, rows: Sequence[Sequence[Any]]) -> None:
    if any(not math.isfinite(one.logprob) for row in rows for one in row):
        raise DataError("its logits are not finite", where=f"the checkpoint {model.name}",
                        remedy="the training has diverged: train it again, with a lower lr for one")  # fmt: skip
