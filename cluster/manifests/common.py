"""What the three writers of manifests share: what is to be started, names, sizes, and YAML with literal blocks.

Invariant: a manifest holds no secret. Keys and Ray's token are named (a Kubernetes secret, a file on the user's
machine) and never read here, so that a manifest may be committed and shown.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.shape import ClusterParams, NodeParams
from modeling.errors import UserError

PORT = 6379  # of Ray's GCS
IDLE_S = 600  # after which a machine without work is given back; between two stages there is less
FILE = "experiment.yaml"  # its name on a cluster, whatever it is called here
ENV_FILE = "stageline.env"  # on the user's machine: NAME=value lines, RAY_AUTH_TOKEN among them
GIB = 2**30  # clouds and Kubernetes call it a GB

# On every fresh machine, head included, before anything is started: the notice agent goes to the background, where
# nobody sees that it cannot start.
HOLDS_STAGELINE = (
    "python -c 'import cluster.agent' || { echo 'no Stageline in this image: build it by its Dockerfile' >&2; exit 1; }"
)

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True)
class Launch:
    """An experiment and the cluster that it asks for. file, text: of the YAML. overrides: of the command line. storage:
    its address, as the driver's metadata tell it. shared_folders: whether every node has the folders that it names."""

    name: str
    storage: str
    file: str
    text: str
    overrides: tuple[str, ...]
    cluster: ClusterParams
    shared_folders: bool = False

    @property
    def image(self) -> str:
        assert self.cluster.image, "told by check()"
        return self.cluster.image

    @property
    def submit(self) -> str:
        """The command that sends the experiment to the cluster of the file, whose dashboard is forwarded to this
        machine."""
        shared = ["--shared-folders"] if self.shared_folders else []
        words = ["stageline", "submit", self.file, *self.overrides, "--address", "http://127.0.0.1:8265", *shared]
        return shlex.join(words)

    @property
    def nodes(self) -> dict[str, NodeParams]:
        """The types of which there may be a machine."""
        return {name: node for name, node in self.cluster.nodes.items() if node.max}

    def slug(self, longest: int) -> str:
        """The experiment's name as clouds and Kubernetes take names: a-z, 0-9 and '-', a letter first."""
        name = re.sub(r"[^a-z0-9-]", "-", self.name).strip("-") or "experiment"
        return (name if name[0].isalpha() else f"x-{name}")[:longest].rstrip("-")


def check(launch: Launch) -> None:
    """What no target could start. Raises UserError."""
    if not launch.cluster.image:
        raise UserError(
            "no 'image', from which the nodes have Ray and Stageline", where=f"{launch.file}: cluster",
            remedy="run `docker build -t REGISTRY/stageline:0.1.0 .` in the project's folder, `docker push` it, and "
            "add 'image: REGISTRY/stageline:0.1.0'",
        )  # fmt: skip
    for name, node in launch.cluster.nodes.items():
        where = f"{launch.file}: cluster.nodes.{name}"
        if not _NAME.fullmatch(name) or len(name) > 40:
            raise UserError(f"{name!r} cannot name machines of a cloud", where=where,
                            remedy="use a-z, 0-9 and -, at most 40 characters")  # fmt: skip
        if node.min > node.max:
            raise UserError(f"min {node.min} is more than max {node.max}", where=where, remedy="raise max")
        if node.gpus and not (node.accelerator or node.instance):
            raise UserError(f"has {node.gpus} GPUs of an unknown type", where=where,
                            remedy="add 'accelerator:' (H100, A100-80G, L4 ...) or 'instance:'")  # fmt: skip
        if node.accelerator and not node.gpus:
            raise UserError(f"names an accelerator, {node.accelerator}, and no GPUs", where=where, remedy="add 'gpus:'")
    if not launch.nodes:
        raise UserError("no type of machine has a 'max' above 0", where=f"{launch.file}: cluster.nodes",
                        remedy="raise one")  # fmt: skip


def instance(launch: Launch, name: str) -> str:
    """The cloud's name of a node type, or of the head (''). Raises UserError where it is not given."""
    cluster = launch.cluster
    found = cluster.nodes[name].instance if name else cluster.head.instance
    if found is None:
        field = f"nodes.{name}" if name else "head"
        example = "n2-standard-8" if cluster.provider == "gcp" else "m6i.2xlarge"
        raise UserError("no 'instance', the cloud's name of the machine", where=f"{launch.file}: cluster.{field}",
                        remedy=f"add 'instance: {example}' or another")  # fmt: skip
    return found


def whole(cpus: float) -> int:
    """Ray counts whole cores of a node."""
    return max(1, int(cpus))


def shared_memory(node: NodeParams) -> float:
    """GB of /dev/shm."""
    return node.shared_memory or math.floor(node.memory / 3 * 10) / 10


def object_store(node: NodeParams) -> int:
    """Bytes of Ray's object store: three quarters of /dev/shm, for torch's and NCCL's own pages lie there too. Where it
    were larger than /dev/shm, Ray would put it on a disk."""
    return int(shared_memory(node) * 0.75 * GIB)


def labels_option(labels: Mapping[str, str]) -> str:
    return "--labels=" + ",".join(f"{key}={value}" for key, value in labels.items())


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as literal blocks, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def render(comment: str, *documents: dict[str, Any]) -> str:
    """YAML of the documents below a comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.strip().splitlines())
    bodies = (yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True) for d in documents)
    return head + "---\n".join(bodies)
