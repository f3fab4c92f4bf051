"""Checkpoints of one stage in a store: shards, then a manifest, then the ledger entry that makes them exist.

Invariants (docs/design.md, "The ledger"): files lie under the token of the attempt that wrote them, so an attempt that
was given up never overwrites a later one's; without the entry a checkpoint does not exist, and only the holder of the
newest token can append it; what is to go is first said to be `retired`, then removed. So a reader that follows the
ledger finds whole checkpoints or, where storage was damaged, learns it from the digests.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import CheckpointError
from orchestrator.ledger import Checkpoint, Ledger, Token
from orchestrator.store import Missing, Store
from stages.io import ResumePoint


@dataclass(frozen=True)
class Checkpoints:
    """Of one attempt. ledger: an object of the calling thread's own. keep: how many stay."""

    store: Store
    prefix: str
    ledger: Ledger
    token: Token
    keep: int

    def put_shard(self, step: int, name: str, data: Any) -> dict[str, Any]:
        """Stores one file (bytes-like); its line in the manifest."""
        digest = hashlib.sha256(data).hexdigest()
        self.store.put(f"{checkpoint_folder(self.prefix, step, self.token)}/{name}", data)
        return {"name": name, "size": memoryview(data).nbytes, "sha256": digest}

    def commit(self, step: int, files: list[dict[str, Any]], meta: dict[str, Any], train_s: float) -> None:
        """Manifest, entry; then what is beyond `keep` goes. Raises Fenced, and nothing exists then."""
        key = f"{checkpoint_folder(self.prefix, step, self.token)}/manifest.json"
        manifest = {"step": step, "token": list(self.token), "files": files, **meta}
        self.store.put(key, json.dumps(manifest, indent=1).encode())
        self.ledger.append("checkpoint", self.token, step=step, manifest=key, train_s=train_s)
        for old in self.ledger.state().checkpoints[self.keep :]:
            retire(self.store, self.ledger, self.token, old)


def token_name(token: Token) -> str:
    return f"e{token[0]:04d}a{token[1]:04d}"


def token_of(name: str) -> Token:
    """The token that token_name() wrote as the first part of a name."""
    return int(name[1:5]), int(name[6:10])


def checkpoint_folder(prefix: str, step: int, token: Token) -> str:
    return f"{prefix}/checkpoints/checkpoint-{step:08d}/{token_name(token)}"


def retire(store: Store, ledger: Ledger, token: Token, old: Checkpoint) -> None:
    """Says that a checkpoint is gone, then removes its files. Raises Fenced, and nothing is removed then."""
    ledger.append("retired", token, step=old.step, manifest=old.manifest)
    remove_folder(store, old.manifest.rsplit("/", 1)[0])


def remove_folder(store: Store, prefix: str) -> None:
    for key in store.list(prefix + "/"):
        store.delete(key)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_folder(store: Store, prefix: str, scratch: Path) -> Path:
    """All objects under a prefix as a local folder: in place where the store is one, else downloaded."""
    local = store.local_path(prefix)
    if local is not None:
        return local
    folder = scratch / prefix.replace("/", "_")
    for key in store.list(prefix + "/"):
        store.get_file(key, folder / key[len(prefix) + 1 :])
    return folder


def verified(store: Store, key: str, scratch: Path, share: tuple[int, int] = (0, 1)) -> ResumePoint:
    """The checkpoint of a manifest, its files local and whole. Raises CheckpointError.

    share: (i, n): where the files lie on a file system that n processes see alike, digest every n-th only.
    """
    prefix, (index, count) = key.rsplit("/", 1)[0], share
    try:
        manifest = json.loads(store.get(key))
        step = int(prefix.rsplit("/", 2)[1].removeprefix("checkpoint-"))
        if manifest["step"] != step:
            raise CheckpointError(f"its manifest says step {manifest['step']}", where=key)
        shared = store.local_path(prefix) is not None
        folder = fetch_folder(store, prefix, scratch)
        for number, item in enumerate(manifest["files"]):
            path = folder / item["name"]
            if not path.is_file() or path.stat().st_size != item["size"]:
                raise CheckpointError(f"{item['name']} is missing or cut off", where=prefix)
            if (not shared or number % count == index) and sha256_of(path) != item["sha256"]:
                raise CheckpointError(f"{item['name']} is damaged: its sha256 is not the manifest's", where=prefix)
        return ResumePoint(step, folder, manifest)
    except (Missing, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"its manifest is missing or damaged ({error!r})", where=key) from error
