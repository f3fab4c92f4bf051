"""Experiments whose manifests are compared byte for byte, and KubeRay's published schemas, closed.

Custom resources prune what they do not know, without a word: a field that is misspelled would be valid and without
effect. So every object whose `properties` are listed takes no others here.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from orchestrator.cli.main import main

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data/manifests"
# By name of the experiment: the targets that the section allows.
EXPERIMENTS = {
    "cluster_quickstart": ("kuberay", "skypilot"),
    "cluster_aws_1b": ("kuberay", "ray-up", "skypilot"),
    "cluster_gcp_8b": ("kuberay", "ray-up"),
}
FILES = {
    "kuberay": ("rayjob.yaml", "raycluster.yaml"),
    "ray-up": ("ray-up.yaml",),
    "skypilot": ("skypilot.yaml",),
}
WRITE = "STAGELINE_WRITE_GOLDEN"  # set it to 1 to write what is compared here anew, and look at the difference


SMALL = """
name: small
storage: s3://bucket/prefix
model: {vision: tiny-vit, language: tiny-qwen2}
data: {some: {meta: s3://bucket/some.json}}
stages:
  some_data: {kind: prepare, data: some}
  mlp_warmup: {needs: [some_data], steps: 2, lr: 1e-3, global_batch: 4, resources: RESOURCES}
cluster: CLUSTER
"""


def small(resources: str, cluster: str, image: str = "registry/it:1") -> str:
    """SMALL with these; the cluster is a flow mapping, or null."""
    return SMALL.replace("RESOURCES", resources).replace("CLUSTER", cluster.replace("{", f"{{image: {image}, ", 1))


def write_all(name: str, folder: Path) -> dict[str, str]:
    """{file name: text} of `stageline cluster manifests` for all targets."""
    experiment = str(ROOT / f"experiments/{name}.yaml")
    assert main(["cluster", "manifests", experiment, "--shared-folders", "--output", str(folder)]) == 0
    return {path.name: path.read_text() for path in folder.iterdir()}


def golden(name: str) -> Path:
    return DATA / name


def is_writing() -> bool:
    return os.environ.get(WRITE) == "1"


def documents(text: str) -> dict[str, Any]:
    """The YAML documents of a file by their kind."""
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@cache
def kuberay(kind: str) -> Any:
    """A validator of a RayJob or RayCluster."""
    from jsonschema import Draft7Validator

    schema = json.loads((DATA / f"schemas/kuberay_{kind.lower()}s_v1.json").read_text())
    known = {"metadata": {"properties": {"name": {"type": "string"}}, "type": "object"}}
    return Draft7Validator(_closed({**schema, "properties": schema["properties"] | known}))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed
