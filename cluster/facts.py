"""What one node says of itself: the material of `stageline cluster check`.

Invariant: to be called in a task on the node in question; what a node lacks is told, never raised, for such a node is
the one that is looked for. Nothing is judged here (orchestrator/checkup.py).
"""

import hashlib
import importlib.metadata
import platform
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

LIBRARIES = ("ray", "torch", "transformers", "deepspeed", "pydantic", "pyarrow", "s3fs")
PACKAGES = ("orchestrator", "stages", "modeling", "cluster")


@dataclass(frozen=True)
class Facts:
    """versions: of Python, libraries and our own code. shared, disk: bytes of /dev/shm, and free ones of the folder for
    temporary files. gpus: their names, as torch sees them. time: unix, when it was asked. storage, torch: why it cannot
    be used, or empty."""

    host: str
    address: str
    versions: dict[str, str]
    shared: int
    disk: int
    files: int  # that one process may open
    gpus: tuple[str, ...] = ()
    time: float = 0.0
    storage: str = ""
    torch: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def facts(address: str) -> Facts:
    """Of this node, but for `storage` and `labels`."""
    import resource

    versions = {"python": platform.python_version(), "stageline": code_digest()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    shm = Path("/dev/shm")
    gpus, broken = _gpus()
    return Facts(
        socket.gethostname(), address, versions, shutil.disk_usage(shm).total if shm.is_dir() else 0,
        shutil.disk_usage(tempfile.gettempdir()).free, resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus, time.time(), torch=broken,
    )  # fmt: skip


def clock() -> float:
    """Of this node, unix seconds."""
    return time.time()


def _gpus() -> tuple[tuple[str, ...], str]:
    """Their names, and why torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its own libraries is missing
        return (), str(error) or type(error).__name__
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.cuda.get_device_name(i) for i in range(count)), ""


def code_digest() -> str:
    """Twelve hex digits of what Python files of the project this process would run."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
