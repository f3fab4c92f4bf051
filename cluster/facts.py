"""What one node says of itself, and what all of them reach together: the material of `stageline cluster check`.

Invariant: to be called in a task or an actor on the node in question; nothing is judged here (orchestrator/checkup.py).
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from cluster.nodes import interface_of

LIBRARIES = ("ray", "torch", "transformers", "deepspeed", "pydantic", "pyarrow", "s3fs")
PACKAGES = ("orchestrator", "stages", "modeling", "cluster")
WARM, ROUNDS = 2, 5  # all-reduces before the measured ones, and those


@dataclass(frozen=True)
class Facts:
    """versions: of Python, libraries and our own code. shared, disk: bytes of /dev/shm, and free ones of the folder for
    temporary files. gpus: their names. time: unix, when it was asked. storage: why it cannot be used, or empty."""

    host: str
    address: str
    versions: dict[str, str]
    shared: int
    disk: int
    files: int  # that one process may open
    gpus: tuple[str, ...] = ()
    time: float = 0.0
    storage: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def facts(address: str) -> Facts:
    """Of this node, but for `storage` and `labels`."""
    import resource

    import torch

    versions = {"python": platform.python_version(), "stageline": code_digest()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    shm = Path("/dev/shm")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Facts(
        socket.gethostname(), address, versions, shutil.disk_usage(shm).total if shm.is_dir() else 0,
        shutil.disk_usage(tempfile.gettempdir()).free, resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        tuple(torch.cuda.get_device_name(i) for i in range(count)), time.time(),
    )  # fmt: skip


def code_digest() -> str:
    """Twelve hex digits of what Python files of the project this process would run."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Peer:
    """One rank of a measurement; an actor on its node, with one GPU where there are any."""

    def __init__(self, address: str, gpus: bool):
        self._address, self._gpus = address, gpus

    def rendezvous(self) -> str:
        """host:port on this node, free a moment ago."""
        with socket.create_server((self._address, 0)) as server:
            return f"{self._address}:{server.getsockname()[1]}"

    def all_reduce(self, rendezvous: str, rank: int, world: int, megabytes: int) -> float:
        """Bus bandwidth in bytes a second: 2 (n - 1) / n of the buffer over the median time (nccl-tests' busbw)."""
        import torch
        import torch.distributed as dist

        if not self._gpus and (card := interface_of(self._address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
        backend, device = ("nccl", "cuda") if self._gpus else ("gloo", "cpu")
        dist.init_process_group(backend, init_method=f"tcp://{rendezvous}", rank=rank, world_size=world)
        try:
            buffer = torch.ones(megabytes * 2**20 // 4, device=device)
            seconds = []
            for _ in range(WARM + ROUNDS):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(buffer)
                if self._gpus:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                buffer.fill_(1.0)
            median = sorted(seconds[WARM:])[ROUNDS // 2]
            return 2 * (world - 1) / world * buffer.numel() * 4 / median
        finally:
            dist.destroy_process_group()
