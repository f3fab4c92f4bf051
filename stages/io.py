"""StageIO: the one contract between a stage and whatever drives it.

A stage never opens a store, a ledger or Ray: it reads its inputs as local folders, asks for the point
to resume from, tells of each step, and hands over files to be kept. The driver's side decides when to
save and when to stop, and only it can make a result count (design.md, "The ledger").
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Signal:
    """What the driver asks of all ranks. Rank 0 receives it after a step; it travels in the next step's all-reduce, at
    whose end all ranks save, or save and stop."""

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
    """The finished result of a parent stage: its name, kind, parameters and local files.

    lend: gives its folder in another process, on whatever machine; it crosses process borders.
    """

    name: str
    kind: str
    fingerprint: str
    folder: Path
    params: dict[str, Any] = field(default_factory=dict)
    lend: Callable[[], Path] | None = None

    @property
    def lent(self) -> Callable[[], Path]:
        return self.lend or partial(Path, self.folder)


class Folder(Protocol):
    """A folder in storage that the tasks of a stage share; it crosses process borders. Names may hold '/'.

    Raises what the store raises: where it cannot serve, and for a name that is not there.
    """

    def create(self, name: str, data: bytes) -> bool:
        """False where the name is taken: exactly one of any number of writers gets True."""
        ...

    def put_file(self, name: str, path: Path) -> dict[str, Any]:
        """Stores a file; returns {name, size, sha256}."""
        ...

    def get(self, names: Sequence[str]) -> list[bytes]: ...

    def fetch(self, name: str, folder: Path) -> Path:
        """As a local file, below `folder` where it is not one already. Not to be written to."""
        ...

    def names(self) -> list[str]:
        """All names in it, sorted."""
        ...

    def copy_to(self, other: "Folder", name: str, new: str) -> None:
        """Within the store: nothing passes this process."""
        ...

    def drop(self, names: Sequence[str]) -> None:
        """Remove these; one that is not there is no error."""
        ...

    def clear(self) -> None:
        """Remove all that is in it."""
        ...


class StageIO(Protocol):
    stage: str
    fingerprint: str
    params: Any  # the kind's parameter model (stages/params.py)
    model: Any  # the experiment's ModelParams
    sources: dict[str, Any]  # the experiment's `data:` (DataParams by name)
    sets: dict[str, Any]  # the experiment's `eval:` (EvalSet by name)
    digests: dict[str, Any]  # the content of those that the stage asks, as it was planned
    inputs: dict[str, Input]  # parents by stage name
    rank: int
    world: int
    scratch: Path  # a local folder of this attempt; gone afterwards

    def checkpoints(self) -> list[str]:
        """The committed checkpoints, newest first, as names for `load`. Ask one rank, tell all."""
        ...

    def load(self, checkpoint: str) -> ResumePoint:
        """Any rank: its files, local and with the right digests. Raises CheckpointError."""
        ...

    def tick(self, step: int, total: int, row: dict[str, Any]) -> Signal:
        """Rank 0, after every step: hand over the metrics row, learn whether to save or stop. Never waits for
        storage; raises what a write behind the training met, or Fenced."""
        ...

    def put_shard(self, step: int, name: str, data: memoryview) -> dict[str, Any]:
        """Any rank, any thread: store one checkpoint file; returns {name, size, sha256} for the manifest."""
        ...

    def saving(self, step: int) -> None:
        """Rank 0: a snapshot of `step` is being taken."""
        ...

    def commit(
        self, step: int, files: list[dict[str, Any]], meta: dict[str, Any], train_s: float, stall_s: float
    ) -> None:
        """Rank 0, any thread: the rows up to `step`, the manifest, then the ledger entry that makes it exist.

        train_s: seconds of the steps since the checkpoint before; stall_s: for how long the training stood still.
        """
        ...

    def stopped(self, step: int) -> None:
        """Any rank: training stopped on request after a committed save; raises what the driver takes as 'preempted'."""
        ...

    def hung(self, text: str) -> None:
        """Any rank, any thread: no step came to an end for too long; text: the stacks of all threads. Stores it and
        ends the process."""
        ...

    def log(self, message: str) -> None:
        """One line for the user and for `stageline logs`."""
        ...

    def keep(self, name: str, path: Path) -> None:
        """Store a file beside the stage (a plan, a table); not part of the result."""
        ...

    def fetch(self, name: str) -> Path:
        """A file that `keep` stored for this stage, as a local path."""
        ...

    def complete(
        self, folder: Path, summary: dict[str, Any], train_s: float = 0.0, stored: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Rank 0: store `folder` as the stage's result and mark the stage completed. train_s: as in `commit`.

        stored: {name, size, sha256} of files of the result that lie in `result_folder()` already.
        """
        ...

    def result_folder(self) -> Folder:
        """Where this attempt's result goes."""
        ...

    def work_folder(self, name: str) -> Folder:
        """Beside the stage, kept from attempt to attempt."""
        ...

    def shared_folder(self, name: str) -> Folder:
        """Of all stages in this storage: for what any of them need not do again."""
        ...

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Not in training stages: run a module-level function over items in parallel, in order."""
        ...

    def stream(self, function: Callable[..., Any], items: Sequence[Any]) -> Iterator[Any]:
        """As `map`, in no order, with results bounded in memory; a class is made once per process and then called."""
        ...
