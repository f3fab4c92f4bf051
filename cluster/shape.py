"""`cluster:` of an experiment: which machines there may be, what they cost an hour, how they are found again.

Invariant: nothing here is part of what a stage is; the same experiment runs without it. Every node that is started from
a node type carries its name as the label NODE_TYPE, beside the labels that Ray's own documents name.
"""

from typing import Annotated, Literal

from pydantic import Field

from stages.base import Params
from stages.params import ACCELERATOR

NODE_TYPE = "stageline.io/node-type"
MARKET = "ray.io/market-type"  # spot or on-demand

Count = Annotated[int, Field(ge=0)]


class HeadParams(Params):
    """`cluster.head:` — the machine of the driver: it trains nothing, and is never a spot machine."""

    instance: str | None = Field(default=None, description="the cloud's name of the machine, e.g. m6i.2xlarge")
    cpus: float = Field(default=8, gt=0, description="cores; Ray places no work there")
    memory: float = Field(default=32, gt=0, description="GB")
    price: float | None = Field(default=None, ge=0, description="an hour, in `currency`")


class NodeParams(Params):
    """`cluster.nodes.<name>:` — one type of machine for workers."""

    instance: str | None = Field(default=None, description="the cloud's name of the machine, e.g. p5.48xlarge")
    accelerator: str | None = Field(default=None, description="Ray's name of its GPUs, e.g. H100, A100-80G, L4")
    gpus: int = Field(default=0, ge=0, description="of each machine")
    cpus: float = Field(gt=0, description="of each machine")
    memory: float = Field(default=64, gt=0, description="GB of each machine")
    shared_memory: float | None = Field(
        default=None, gt=0, description="GB of /dev/shm; None: a third of `memory`, for Ray's object store"
    )
    spot: bool = Field(default=False, description="may be taken away at any moment, with a notice")
    price: float | None = Field(default=None, ge=0, description="of a whole machine an hour, in `currency`")
    min: Count = Field(default=0, description="machines that are always there")
    max: Count = Field(default=1, description="machines at most")

    def labels(self, name: str) -> dict[str, str]:
        """Of every node of this type, called `name`."""
        accelerator = {ACCELERATOR: self.accelerator} if self.accelerator else {}
        return {NODE_TYPE: name, MARKET: "spot" if self.spot else "on-demand", **accelerator}


class ClusterParams(Params):
    """`cluster:` — from which manifests are written, and what a stage's time costs."""

    image: str | None = Field(
        default=None,
        description="container image of all nodes, by the Dockerfile of Stageline; manifests need it",
    )
    head: HeadParams = HeadParams()
    nodes: dict[str, NodeParams] = Field(min_length=1, description="types of machine, by a name of yours")
    currency: str = Field(default="USD", pattern="[A-Z]{3}", description="of all prices")
    provider: Literal["aws", "gcp"] | None = Field(default=None, description="of `ray up` and SkyPilot")
    region: str | None = Field(default=None, description="e.g. us-east-1")
    zone: str | None = Field(default=None, description="e.g. us-central1-a; for GCP")
    project: str | None = Field(default=None, description="of Google Cloud")
    secret: str = Field(
        default="stageline", description="the Kubernetes secret whose entries are the nodes' environment: S3 keys"
    )
    grace: float = Field(default=120, gt=0, description="seconds between a notice and the end of a machine")
    setup: tuple[str, ...] = Field(
        default=(), description="shell commands on each fresh machine of `ray up` and SkyPilot"
    )
