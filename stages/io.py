"""StageIO: the one contract between a stage and whatever drives it.

A stage never opens a store, a ledger or Ray: it reads its inputs as local folders, asks for the point
to resume from, tells of each step, and hands over files to be kept. The driver's side decides when to
save and when to stop, and only it can make a result count (design.md, "The ledger").
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Signal:
    """What the driver asks of all ranks after a step. Rank 0 receives it and broadcasts it."""

    save: bool = False
    stop: bool = False


@dataclass(frozen=True)
class ResumePoint:
    """The last committed checkpoint: the step it was taken after, its files in `folder`, digests verified."""

    step: int
    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Input:
    """The finished result of a parent stage: its name, kind, parameters and local files."""

    name: str
    kind: str
    fingerprint: str
    folder: Path
    params: dict[str, Any] = field(default_factory=dict)


class StageIO(Protocol):
    stage: str
    fingerprint: str
    params: Any  # the kind's parameter model (stages/params.py)
    model: Any  # the experiment's ModelParams
    sources: dict[str, Any]  # the experiment's `data:` (DataParams by name)
    inputs: dict[str, Input]  # parents by stage name
    rank: int
    world: int
    scratch: Path  # a local folder of this attempt; gone afterwards

    def resume_point(self) -> ResumePoint | None:
        """The newest committed checkpoint whose files are all there with the right digests."""
        ...

    def tick(self, step: int, total: int, row: dict[str, Any]) -> Signal:
        """Rank 0, after every step: record the metrics row, learn whether to save or stop."""
        ...

    def flush(self, step: int) -> None:
        """Rank 0, before a commit: store the metrics rows up to `step`, so that no surviving step lacks its row."""
        ...

    def stopped(self, step: int) -> None:
        """Any rank: training stopped on request after a committed save; raises what the driver takes as 'preempted'."""
        ...

    def log(self, message: str) -> None:
        """One line for the user and for `stageline logs`."""
        ...

    def put_shard(self, step: int, name: str, path: Path) -> dict[str, Any]:
        """Any rank: store one checkpoint file; returns {name, size, sha256} for the manifest."""
        ...

    def commit(self, step: int, files: list[dict[str, Any]], meta: dict[str, Any]) -> None:
        """Rank 0: write the manifest, then the ledger entry that makes the checkpoint exist."""
        ...

    def keep(self, name: str, path: Path) -> None:
        """Store a file beside the stage (a plan, a table); not part of the result."""
        ...

    def fetch(self, name: str) -> Path:
        """A file that `keep` stored for this stage, as a local path."""
        ...

    def complete(self, folder: Path, summary: dict[str, Any]) -> None:
        """Rank 0: store `folder` as the stage's result and mark the stage completed."""
        ...

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Not in training stages: run a module-level function over items in parallel, in order."""
        ...
