"""What an evaluation came to: tables, curves and comparisons as evaluation.json, and all answers beside it.

Invariant: every figure here is a function of the stored answers; two runs over the same pool give the same files.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modeling import files
from modeling.remote import address
from stages.evaluate import figures, pools, score, voting
from stages.evaluate.questions import Asked, checkpoints
from stages.evaluate.statistics import compare
from stages.io import StageIO
from stages.plan_packs import parent

PARTS = {"vision": "vision_tower.", "mlp": "multi_modal_projector."}  # of the keys on disk; the rest is the language's
SHORT = ("n", "right", "accuracy", "low", "high")


def write(folder: Path, io: StageIO, answers: Sequence[Any], loss: dict[str, Any]) -> dict[str, Any]:
    """Writes all files of the result; returns what evaluation.json holds. answers: run.Answers of every form."""
    params, several = io.params, len({its.model.name for its in answers}) > 1
    seed = params.fallback_seed if params.fallback == "random" else None
    tables, values = {}, {}
    with (folder / "predictions.jsonl").open("w", encoding="utf-8", errors="surrogatepass") as file:
        for its in answers:
            name = f"{its.variant} · {its.model.name}" if several else its.variant
            found = _read(its.asked, its.greedy, seed)
            tables[name], values[name] = _table(its, found), found
            for one, row, (answer, value) in zip(its.asked, its.greedy, found, strict=True):
                file.write(_line(_greedy(its, one, row[0], answer, value)))
    sampled = [its for its in answers if its.sampled is not None]
    for its in sampled if params.ensemble.live else ():
        name = f"{its.variant}, vote of up to {params.sampling.samples}"
        tables[f"{name} · {its.model.name}" if several else name] = _voted(its)
    with (folder / "samples.jsonl").open("w", encoding="utf-8", errors="surrogatepass") as file:
        for its in sampled:
            for row in _samples(its):
                file.write(_line(row))
    curves, comparisons = _scaling(params, [] if params.ensemble.live else sampled)
    told: dict[str, Any] = {
        "stage": answers[0].model.name,
        "checkpoints": list(dict.fromkeys(its.model.name for its in answers)),
        "fingerprints": list(dict.fromkeys(its.model.fingerprint for its in answers)),
        "data": getattr(parent(io, "prepare"), "name", None),
        "sets": list(params.sets),
        "tables": tables,
        "maximum": _maximum(answers, tables, several),
        "curves": curves,
        "comparisons": _forms(answers, values) + comparisons,
        "loss": next(iter(loss.values()), {}),
        "losses": loss,
        "sampling": None if params.sampling is None else params.sampling.model_dump(mode="json"),
        "ensemble": params.ensemble.model_dump(mode="json"),
        "fallback": params.fallback,
    }
    trained = next((item.folder / "trained.json" for item in checkpoints(io)), None)
    if trained is not None and trained.is_file():
        told["trained"] = json.loads(trained.read_text())
    known = told.get("trained", {}).get("parameters")
    told["parameters"] = known or _parameters(*_stored(io, answers[0].model))
    (folder / "evaluation.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    (folder / "scores.json").write_text(json.dumps(short(tables), indent=1, ensure_ascii=False) + "\n")
    return told


def _maximum(answers: Sequence[Any], tables: dict[str, Any], several: bool) -> dict[str, Any]:
    """Of each checkpoint over the forms in which it was asked, greedily: {task, or "task · checkpoint": row}."""
    out = {}
    for model in dict.fromkeys(its.model.name for its in answers):
        forms = {its.variant: f"{its.variant} · {model}" if several else its.variant
                 for its in answers if its.model.name == model}  # fmt: skip
        found = score.maximum({form: tables[name] for form, name in forms.items()})
        out |= {f"{task} · {model}" if several else task: row for task, row in found.items()}
    return out


def short(tables: dict[str, Any]) -> dict[str, Any]:
    """{task: {n, right, accuracy, low, high}} of the first form."""
    first = next(iter(tables.values()))
    return {task: {key: row[key] for key in SHORT} for task, row in first.items()}


def summary(told: dict[str, Any]) -> dict[str, Any]:
    """What the ledger keeps: enough for the table that `run` prints."""
    tables = {name: short({name: table}) for name, table in told["tables"].items()}
    keys = ("stage", "data", "sets", "maximum")
    return {key: told[key] for key in keys} | {"scores": short(told["tables"]), "tables": tables}


def lines(told: dict[str, Any]) -> Iterator[str]:
    """For the log: every table, and what the methods came to."""
    for name, table in told["tables"].items():
        for task, row in table.items():
            unread = f", {row['unparsable']:.1%} unparsable" if row["unparsable"] else ""
            yield f"{told['stage']} {task}, {name}: {figures.with_interval(row)} n={row['n']}{unread}"
    if len(told["tables"]) > 1:
        for task, row in told["maximum"].items():
            yield f"{told['stage']} {task}, {row['label']}: {figures.share(row['accuracy'])} ({row['prompt']})"
    for row in told["comparisons"]:
        low, high = figures.share(row["low"]), figures.share(row["high"])
        yield f"{row['task']}, {row['prompt']}: {row['a']} − {row['b']} = {figures.share(row['difference'])} " \
              f"[{low}, {high}], p {row['p']:.2g}"  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(asked: Sequence[Asked], rows: Sequence[Sequence[dict]], seed: int | None) -> list[tuple[str | None, float]]:
    """The answer of each greedy row and its value."""
    out = []
    for one, row in zip(asked, rows, strict=True):
        answer = score.answer_of(one.item, row[0]["text"], row[0]["cut"])
        out.append((answer, score.value_of(one.item, answer, seed)))
    return out


def _table(its: Any, found: Sequence[tuple[str | None, float]]) -> dict[str, Any]:
    rows = [row[0] for row in its.greedy]
    return score.table(
        [one.item for one in its.asked], [answer for answer, _ in found], [row["cut"] for row in rows],
        [row["tokens"] for row in rows], [value for _, value in found],
    )  # fmt: skip


def _voted(its: Any) -> dict[str, Any]:
    """The table of a live ensemble: each question's vote, with all the tokens it took, and `samples` of a question."""
    items, winners, tokens, drawn = [one.item for one in its.asked], [], [], {}
    for i, item in enumerate(items):
        voters = _voters(its, i)
        keys = [None if one["answer"] is None else score.key_of(item, one["answer"]) for one in voters]
        key = voting.winner(keys)
        winners.append(None if key is None else voters[keys.index(key)]["answer"])
        tokens.append(sum(one["tokens"] for one in voters))
        drawn.setdefault(item.task, []).append(len(voters))
    values = [score.value_of(item, answer) for item, answer in zip(items, winners, strict=True)]
    table = score.table(items, winners, [False] * len(items), tokens, values)
    return {task: row | {"samples": sum(drawn[task]) / len(drawn[task])} for task, row in table.items()}


def _greedy(its: Any, one: Asked, row: dict[str, Any], answer: str | None, value: float) -> dict[str, Any]:
    item = one.item
    return {
        "id": item.id, "task": item.task, "prompt": its.variant, "checkpoint": its.model.name, "answer": answer,
        "reference": item.references[0] if len(item.references) == 1 else list(item.references), "value": value,
        "right": value == 1, "response": row["text"], "tokens": row["tokens"], "cut": row["cut"],
    }  # fmt: skip


def _samples(its: Any) -> Iterator[dict[str, Any]]:
    for i, (one, row) in enumerate(zip(its.asked, its.sampled, strict=True)):
        for j, sample in enumerate(row):
            answer = score.answer_of(one.item, sample["text"], sample["cut"])
            yield {
                "id": one.item.id, "key": one.key, "task": one.item.task, "prompt": its.variant,
                "checkpoint": its.model.name, "sample": j, "answer": answer,
                "value": score.value_of(one.item, answer), "scores": _scores(its, i, j, sample),
                "response": sample["text"], **{k: sample[k] for k in ("tokens", "logprob", "cut")},
            }  # fmt: skip


def _scores(its: Any, i: int, j: int, sample: dict[str, Any]) -> dict[str, float]:
    """Of a sample by the name of the re-ranker; those that come with it also under the names they were given."""
    free = {"likelihood": sample["logprob"] / max(1, sample["tokens"])}
    if sample["certainty"] is not None:  # vLLM does not know it
        free["certainty"] = sample["certainty"]
    named = {name: free[kind] for name, kind in its.free.items() if kind in free}
    return free | named | {name: rows[i][j] for name, rows in (its.scores or {}).items()}


def _scaling(params: Any, sampled: Sequence[Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Curves by task, and comparisons, of each form that was sampled: of each checkpoint, and of all together."""
    curves: dict[str, list[dict[str, Any]]] = {}
    comparisons: list[dict[str, Any]] = []
    kinds = {name: its.kind for name, its in params.rerank.items()}
    for variant in dict.fromkeys(its.variant for its in sampled):
        group = [its for its in sampled if its.variant == variant]
        tasks = dict.fromkeys(one.item.task for one in group[0].asked)
        for task in tasks:
            places = [i for i, one in enumerate(group[0].asked) if one.item.task == task]
            items = [group[0].asked[i].item for i in places]
            rows = [[_voters(its, i) for i in places] for its in group]
            found = pools.pools_of(rows, *counting(items))
            sets = [[pool] for pool in found] + ([found] if len(found) > 1 else [])
            names = [its.model.name for its in group] + ([" + ".join(its.model.name for its in group)])
            for name, its in zip(names, sets):
                told = {"task": task, "prompt": variant, "checkpoint": name}
                drawn, pairs = pools.study([its], kinds, params.ensemble.threshold, params.ensemble.posterior)
                curves.setdefault(task, []).extend(told | one for one in drawn)
                comparisons += [told | one for one in pairs]
    return curves, comparisons


def counting(items: Sequence[Any]) -> tuple[Any, Any]:
    """(keys, value) for pools.pools_of."""
    return (
        lambda i, answer: score.key_of(items[i], answer),
        lambda i, answer: score.value_of(items[i], answer),
    )


def _voters(its: Any, i: int) -> list[dict[str, Any]]:
    item = its.asked[i].item
    return [
        {
            "answer": score.answer_of(item, sample["text"], sample["cut"]), "tokens": sample["tokens"],
            "logprob": sample["logprob"], "scores": _scores(its, i, j, sample),
        }
        for j, sample in enumerate(its.sampled[i])
    ]  # fmt: skip


def _forms(answers: Sequence[Any], values: dict[str, list[tuple[str | None, float]]]) -> list[dict[str, Any]]:
    """Every other form against the first one, greedily, on the same questions."""
    names, out = list(values), []
    first = answers[0]
    for name, its in list(zip(names, answers))[1:]:
        for task in dict.fromkeys(one.item.task for one in first.asked):
            mine = {one.key: value for one, (_, value) in zip(its.asked, values[name]) if one.item.task == task}
            base = {one.key: value for one, (_, value) in zip(first.asked, values[names[0]])}
            keys = [key for key in mine if key in base]
            if keys:
                found = compare([mine[key] for key in keys], [base[key] for key in keys])
                out.append({"task": task, "prompt": "greedy", "a": name, "b": names[0], **vars(found)})
    return out


def _stored(io: StageIO, model: Any) -> tuple[str, str | None]:
    """Where the weights of a checkpoint lie, and the endpoint of that store."""
    return (str(model.open()), None) if checkpoints(io) else (address(io.model.folder), io.model.endpoint_url)


def _parameters(folder: str, endpoint: str | None) -> dict[str, int]:
    """Of each module, as stored: from the headers of the safetensors alone, which start with their length."""
    counts = dict.fromkeys((*PARTS, "language"), 0)
    for path in files.inside(folder, endpoint):
        if not path.endswith(".safetensors"):
            continue
        size = int.from_bytes(files.read(path, endpoint, 0, 8), "little")
        header = json.loads(files.read(path, endpoint, 8, size))
        for key in header.keys() - {"__metadata__"}:
            part = next((name for name, start in PARTS.items() if start in key), "language")
            counts[part] += math.prod(header[key]["shape"])
    return counts
