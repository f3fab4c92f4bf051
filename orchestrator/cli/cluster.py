"""`stageline cluster ...`: manifests of a cluster, whether one is fit to train on, and the files that watch it."""

import argparse
from importlib import import_module
from typing import Any

# verb -> (module beside this one, what it does); each module has arguments(parser) and run(options)
VERBS = {
    "manifests": ("manifests", "write the files that start a cluster of the experiment's `cluster:` section"),
    "check": ("check", "whether the nodes of a running cluster are fit for the experiment"),
    "monitoring": ("monitoring", "write the files with which Prometheus and Grafana watch a cluster"),
}


def arguments(sub: argparse.ArgumentParser) -> None:
    verbs = sub.add_subparsers(dest="cluster_verb", required=True, metavar="VERB")
    for name, (_, text) in VERBS.items():
        _module(name).arguments(verbs.add_parser(name, help=text, description=text))


def cluster(options: argparse.Namespace) -> int:
    return _module(options.cluster_verb).run(options)


def _module(verb: str) -> Any:
    return import_module(f"orchestrator.cli.cluster_{VERBS[verb][0]}")
