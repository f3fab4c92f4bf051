"""The command `stageline`. A user's mistake is one message on stderr and exit 2; a bug of ours a traceback and 1."""

import argparse
import os
import sys
import traceback

from modeling.errors import UserError
from modeling.files import Unavailable
from orchestrator.cli import cluster as cluster_verb
from orchestrator.cli import commands, jobs, weights
from orchestrator.cli import eval as eval_verb
from orchestrator.cli.demo import demo
from orchestrator.cli.gc import gc
from orchestrator.cli.logs import logs
from orchestrator.cli.report import report
from orchestrator.cli.run import run
from orchestrator.errors import StorageTransient
from orchestrator.redaction import installed


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="stageline",
        description="Trains InternVL-2.5-style models through all their stages from one YAML file, on Ray.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        job = " or the id of a job" if name in ("status", "logs") else ""
        sub.add_argument("experiment", help=f"the experiment's YAML file{job}")
        sub.set_defaults(function=function)
        return sub

    overrides = "settings on top of the file, e.g. stages.full_finetune.lr=1e-5"
    sub = verb("plan", commands.plan, "show what run would do with every stage, and why; nothing is started")
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub = verb("run", run, "run every stage that is not done; anything may be killed, run again to go on")
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub.add_argument("--address", help="a Ray cluster to use (default: RAY_ADDRESS, else a Ray of its own on loopback)")
    text = "seconds that running stages may train on after SIGTERM or Ctrl-C, before they save and stop (default 0)"
    sub.add_argument("--grace", type=float, default=0.0, metavar="SECONDS", help=text)
    sub.add_argument("--base", metavar="DIR", help="that relative paths in the file count from (default: its folder)")
    cluster = "the dashboard of the cluster's head (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    sub = verb("submit", jobs.submit, "run it on a Ray cluster: a driver on its head; again: goes on where it was")
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub.add_argument("--address", metavar="URL", help=cluster)
    sub.add_argument("--follow", "-f", action="store_true", help="print what it says until it ends")
    text = "seconds that running stages may train on after SIGTERM, before they save and stop (default 0)"
    sub.add_argument("--grace", type=float, default=0.0, metavar="SECONDS", help=text)
    text = "every node mounts the folders that the file names, under the same paths"
    sub.add_argument("--shared-folders", action="store_true", help=text)
    sub.add_argument("--python", default="python", help="the cluster's, with Ray in it (default: python of its PATH)")
    text = "the experiments that were submitted to a cluster"
    sub = verbs.add_parser("list", help=text, description=text)
    sub.add_argument("--address", metavar="URL", help=cluster)
    sub.set_defaults(function=jobs.list_jobs)
    text = "have all stages of a submitted experiment save and stop; submit goes on from there"
    sub = verbs.add_parser("cancel", help=text, description=text)
    sub.add_argument("job", help="its id, as submit and list print it")
    sub.add_argument("--address", metavar="URL", help=cluster)
    text = "seconds that running stages may train on (default 0)"
    sub.add_argument("--grace", type=float, default=0.0, metavar="SECONDS", help=text)
    sub.set_defaults(function=jobs.cancel)
    sub = verb("status", commands.status, "the state of every stage, from storage alone; or of a job, from its cluster")
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub.add_argument("--address", metavar="URL", help=f"for a job: {cluster}")
    sub = verb("logs", logs, "what the attempts of a stage said; or what a submitted job says")
    sub.add_argument("stage", nargs="?", help="of the experiment; not with a job")
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub.add_argument("--follow", "-f", action="store_true", help="go on until it ends")
    sub.add_argument("--address", metavar="URL", help=f"for a job: {cluster}")
    text = "one HTML file with all that storage knows: graph, curves, attempts, evaluations, scaling"
    sub = verb("report", report, text)
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub.add_argument("--output", default="report.html", metavar="FILE", help="where to write it (default report.html)")
    text = "a notice of preemption to what runs: it saves, trains on, saves last, stops, and is started again"
    sub = verb("preempt", commands.preempt, text)
    sub.add_argument("--deadline", type=float, default=30.0, metavar="SECONDS", help="until the end (default 30)")
    sub.add_argument("--stage", help="this one only")
    sub.add_argument("overrides", nargs="*", help=overrides)
    sub = verb("gc", gc, "remove checkpoints of completed stages and what lost attempts left in storage")
    sub.add_argument("--dry-run", action="store_true", help="only tell")
    sub = verb("ask", commands.ask, "one question to a trained stage, with or without pictures or a video")
    sub.add_argument("stage", help="a trained one")
    sub.add_argument("question", help="<image> in it says where a picture stands; else they come first")
    media = sub.add_mutually_exclusive_group()
    media.add_argument("--image", action="append", default=[], help="a picture; once for each")
    media.add_argument("--video", metavar="FILE", help="a video, shown by its middle frames of equal intervals")
    text = "frames of the video that are shown (default: the most that the stage was trained with)"
    sub.add_argument("--frames", type=int, metavar="N", help=text)
    sub.add_argument("--max-tiles", type=int, default=12, help="tiles for all pictures together (default 12)")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="of the answer (default 64)")

    text = "an exported model on evaluation sets: direct, step by step, and with votes of many samples"
    sub = verbs.add_parser("eval", help=text, description=text)
    eval_verb.arguments(sub)
    sub.set_defaults(function=eval_verb.evaluate)

    text = "files that start and watch a cluster, and a check of a running one"
    sub = verbs.add_parser("cluster", help=text, description=text)
    cluster_verb.arguments(sub)
    sub.set_defaults(function=cluster_verb.cluster)

    text = "a page on this machine that asks a trained stage or a model folder: pictures, samples and their vote"
    sub = verbs.add_parser("demo", help=text, description=text)
    sub.add_argument("source", help="an experiment's YAML file, or a model folder in Hugging Face layout")
    sub.add_argument("stage", nargs="?", help="of the experiment: a trained one, or an export")
    sub.add_argument("--host", default="127.0.0.1", help="the address to serve (default 127.0.0.1: this machine alone)")
    sub.add_argument("--port", type=int, default=7860, help="default 7860")
    sub.add_argument("--max-tiles", type=int, default=12, help="tiles for all pictures together (default 12)")
    sub.set_defaults(function=demo)

    def folders(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument("--output", required=True, metavar="DIR", help="a new folder")
        sub.add_argument("--tokenizer", metavar="FOLDER", help="take this folder's tokenizer instead")
        sub.add_argument("--image-token-id", type=int, metavar="ID", help="<IMG_CONTEXT>, where no tokenizer tells")
        sub.set_defaults(function=function)
        return sub

    text = "a model folder, official or Hugging Face, or a ViT and a language model, into a Hugging Face folder"
    sub = folders("import", weights.import_, text)
    sub.add_argument("source", nargs="?", help="a whole model; its layout is recognised")
    sub.add_argument("--vision", metavar="VIT", help="a ViT alone: a folder or a preset")
    sub.add_argument("--language", metavar="LLM", help="a language model alone: a folder or a preset")
    sub.add_argument("--seed", type=int, default=0, help="of the fresh projector between --vision and --language")
    sub = folders("export", weights.export, "a model folder of either layout into Hugging Face's or the official one")
    sub.add_argument("source", help="a whole model; its layout is recognised")
    sub.add_argument("--layout", choices=("hf", "official"), required=True, help="of what is written")
    return top


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options and settings in any order, where argparse takes no setting after the first option."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and options.verb == "logs" and options.stage is None:
        options.stage = rest.pop(0)
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 our bug or a lost machine, 2 the user's to mend, 130 interrupted."""
    with installed():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the verbs show their own progress
    options = parse(arguments)
    try:
        return options.function(options)
    except UserError as error:
        print(f"stageline: {error}", file=sys.stderr)
        return 2
    except (StorageTransient, Unavailable) as error:
        print(f"stageline: the store does not answer: {error} → try again when it is up", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstageline: interrupted; run again to go on from the last checkpoints", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
