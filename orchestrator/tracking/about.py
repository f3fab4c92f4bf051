"""What a tracker is told of a stage, apart from its rows, and what it implements to be told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.store import Store


@dataclass(frozen=True)
class About:
    """run: its id, the same for as long as the stage's ledger goes on, whoever drives it: 16 digits of the fingerprint
    and six of the nonce of the ledger's first entry, so that a stage that was moved away and begun anew is another run.
    config: holds no secret. cards(folder): writes the data cards of the stage there and names them."""

    run: str
    experiment: str
    stage: str
    kind: str
    config: dict[str, Any]
    store: Store
    prefix: str  # of the stage in the store
    cards: Callable[[Path], Sequence[Path]]


class Tracker(Protocol):
    """One run at a tracker, in one process. Any call may raise what the tracker's library raises."""

    name: str
    last: int  # the last step that is recorded, as far as is known
    moved: str  # once it is open: where its files are, in a sentence, if not where they were asked for; else ""

    def open(self) -> None:
        """Begin or go on with the run, and learn `last`."""
        ...

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of steps beyond `last`, in order. Moves `last` with each."""
        ...

    def finish(self, done: bool) -> None:
        """Nothing more comes from this process. done: the stage is completed."""
        ...
