"""`stageline eval FOLDER --set NAME=PATH`: the evaluate stage alone, on any exported model, through the same machinery.

It writes an ordinary experiment file beside its results, and runs it: killed, it goes on; edited, it can be run again.
"""

import argparse
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from modeling.errors import UserError
from orchestrator.cli.run import run
from orchestrator.redaction import found_in
from orchestrator.spec import NAME

FORMATS = {".tsv": "tsv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "mmmu"}


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="a folder in Hugging Face layout, as export writes it")
    text = "an evaluation set; once for each. .tsv is read as VLMEvalKit's, .jsonl as our own, .parquet as MMMU's"
    sub.add_argument("--set", action="append", default=[], metavar="NAME=PATH", dest="sets", required=True, help=text)
    sub.add_argument("--format", help="of all sets: mmmu, tsv, jsonl, or your own reader as module:function")
    sub.add_argument("--prompts", default="direct,cot", help="forms of the question (default direct,cot)")
    text = "samples of each question, of which votes, pass@k and re-ranking are counted (default 0: greedy only)"
    sub.add_argument("--samples", type=int, default=0, metavar="N", help=text)
    sub.add_argument("--temperature", type=float, default=0.7, help="at which samples are drawn (default 0.7)")
    text = "of an answer, for every prompt (default: 1024, and for direct 16, or 100 for texts and regions)"
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help=text)
    sub.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    text = "what an answer that cannot be read counts as: none is wrong; random draws, as old parsers do"
    sub.add_argument("--fallback", choices=("none", "random"), default="none", help=text)
    sub.add_argument("--seed", type=int, default=0, help="of the samples and the fallback")
    sub.add_argument("--workers", type=int, default=1, help="processes that generate side by side (default 1)")
    sub.add_argument("--cpus", type=float, default=1, help="of each worker")
    sub.add_argument("--gpus", type=float, default=0, help="of each worker")
    sub.add_argument("--output", default="runs/eval", metavar="DIR", help="(default runs/eval)")
    sub.add_argument("--address", help="a Ray cluster to use (default: RAY_ADDRESS, else a Ray of its own on loopback)")


def evaluate(options: argparse.Namespace) -> int:
    folder, output = Path(options.model).absolute(), Path(options.output)
    if not (folder / "config.json").is_file():
        raise UserError("is no model folder: it has no config.json", where=options.model,
                        remedy="give a folder that stageline export wrote")  # fmt: skip
    experiment = _experiment(options, folder)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "eval.yaml"
    _write(path, yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))
    print(f"{path}: what is run; edit it and use stageline run for more")
    options.experiment, options.overrides, options.grace = str(path), [], 0.0
    options.base = None
    return run(options)


def _write(path: Path, text: str) -> None:
    """What is there and differs may have been edited: it is kept beside the new one."""
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        kept = next(name for n in count(1) if not (name := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(kept)
        print(f"{kept}: what {path} was before; it differs")
    path.write_text(text, encoding="utf-8")


def _experiment(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    prompts = [name.strip() for name in options.prompts.split(",") if name.strip()]
    words = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    stage: dict[str, Any] = {
        "kind": "evaluate", "model": "model", "sets": [], "prompts": {name: dict(words) for name in prompts},
        "fallback": options.fallback, "fallback_seed": options.seed,
        "resources": {"workers": options.workers, "cpus": options.cpus, "gpus": options.gpus},
    }  # fmt: skip
    if options.limit is not None:
        stage["limit"] = options.limit
    if options.samples:
        stage["sampling"] = {"samples": options.samples, "temperature": options.temperature, "seed": options.seed}
    sets = {}
    for given in options.sets:
        name, equals, path = given.partition("=")
        if not equals or not path:
            raise UserError(f"--set {given}", where="eval", remedy="write --set NAME=PATH, e.g. mmmu=data/mmmu.parquet")
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is not a valid name of a set", where=f"--set {given}",
                            remedy="use only a-z, 0-9, _ and -")  # fmt: skip
        if name in sets:
            raise UserError(f"the set '{name}' is given twice", where=f"--set {given}",
                            remedy="give each a name of its own")  # fmt: skip
        if what := found_in(path):
            raise UserError(f"its path holds {what}", where=f"--set {name}", remedy="set it in the environment")
        kind = options.format or FORMATS.get(Path(path).suffix)
        if kind is None:
            raise UserError(f"the format of {path} is not known", where="--set", remedy="add --format mmmu|tsv|jsonl")
        sets[name] = {"format": kind, "path": path if "://" in path else str(Path(path).absolute())}
        stage["sets"].append(name)
    return {
        "name": "eval", "storage": "storage", "models": {"model": {"folder": str(folder)}}, "eval": sets,
        "stages": {"evaluate": stage},
    }  # fmt: skip
