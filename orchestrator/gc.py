"""Gives back what storage holds in vain: checkpoints of completed stages, and what attempts that were given up left.

Invariants (docs/design.md, "The ledger"): ledger entries stay, and so does all that has the newest token of a stage
which is not completed, for its holder may be about to commit it. What lies under a lower token and is named by no entry
that counts will never be named by one, because its writer is fenced. What does count is said to be `retired` before it
is removed. So this is safe at any moment beside drivers, zombies and another gc; what a zombie writes afterwards, the
next gc finds.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoints import token_of
from orchestrator.errors import Fenced
from orchestrator.ledger import Ledger, StageState, state
from orchestrator.store import TEMPORARY, Missing, Store

STALE_S = 3600.0  # the age at which a temporary file's writer is taken for dead

_FOLDERS = ("checkpoints", "result", "parts", "control", "heartbeat")  # nothing else of a stage is ever looked at
_TOKEN = re.compile(r"e\d{4}a\d{4}")


@dataclass(frozen=True)
class Freed:
    """What was removed from one stage, or would be. note: why the stage was left alone."""

    prefix: str
    objects: int = 0
    bytes: int = 0
    note: str = ""


def collect(store: Store, prefixes: Iterable[str], dry_run: bool = False) -> list[Freed]:
    """prefixes: folders of stages. dry_run: change nothing. Raises UserError for a ledger that cannot be read."""
    return [_collect(store, prefix, dry_run) for prefix in prefixes]


def _collect(store: Store, prefix: str, dry_run: bool) -> Freed:
    ledger = Ledger(store, prefix)
    entries = ledger.entries()
    if any(entry.type == "unknown" for entry in entries):
        return Freed(prefix, note="left alone: a newer Stageline wrote to its ledger")
    now = state(entries)
    if now.completed is not None and not dry_run:
        try:
            for checkpoint in now.checkpoints:
                ledger.append("retired", now.token, step=checkpoint.step, manifest=checkpoint.manifest)
        except Fenced as error:
            return Freed(prefix, note=f"left alone: {error}")
    objects = total = 0
    for folder in _FOLDERS:
        for key in store.list(f"{prefix}/{folder}/"):
            if _in_vain(key[len(prefix) + 1 :], prefix, now):
                try:
                    size = store.size(key)
                except Missing:
                    continue  # another gc, or its owner's retention, was faster
                if not dry_run:
                    store.delete(key)
                objects, total = objects + 1, total + size
    temporary, size = _temporaries(store.local_path(prefix), dry_run)
    return Freed(prefix, objects + temporary, total + size)


def _in_vain(name: str, prefix: str, now: StageState) -> bool:
    """name: a key without the stage's prefix. Names that nobody here writes are not ours to judge."""
    kind, *parts = name.split("/")
    if kind == "heartbeat":
        epoch = parts[0].removesuffix(".json")
        return epoch.isdecimal() and int(epoch) < now.token[0]
    if kind == "parts":  # of a prepare stage, which an attempt takes over from the one before
        return now.completed is not None
    part = parts[1] if kind == "checkpoints" and len(parts) > 1 else parts[0].removesuffix(".json")
    if _TOKEN.fullmatch(part) is None:
        return False
    given_up, completed = token_of(part) < now.token, now.completed
    if kind == "control":
        return given_up
    if kind == "result":
        used = completed is not None and completed["manifest"]["folder"] == f"{prefix}/result/{part}"
        return (completed is not None or given_up) and not used
    folder = f"{prefix}/checkpoints/{parts[0]}/{part}/"
    counted = any(checkpoint.manifest.startswith(folder) for checkpoint in now.checkpoints)
    return completed is not None or (given_up and not counted)


def _temporaries(folder: Path | None, dry_run: bool) -> tuple[int, int]:
    """(files, bytes): files that a writer on a file system began and never finished."""
    files = total = 0
    for path in folder.rglob(f"{TEMPORARY}*") if folder is not None else ():
        try:
            found = path.stat()
        except FileNotFoundError:
            continue  # its writer lives and has just finished
        if time.time() - found.st_mtime > STALE_S:
            if not dry_run:
                path.unlink(missing_ok=True)
            files, total = files + 1, total + found.st_size
    return files, total
