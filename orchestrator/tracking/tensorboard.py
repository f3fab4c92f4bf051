"""TensorBoard: event files in a folder per run, written anew from storage by each driver.

Invariant: the folder of a run holds every step of the surviving lineage once. A driver that begins removes what an
earlier one left there, which may end in the middle of a record, and writes all rows from the first; its file says so to
a TensorBoard that is looking (a session that starts at step 1 purges what was read before). A copy is put into storage
at `experiments/<name>/tensorboard/<stage>/<run>/` when a driver ends with the stage: a head's disk goes with the head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from orchestrator.tracking.about import About
from orchestrator.tracking.params import TensorBoardParams
from orchestrator.tracking.place import place
from orchestrator.tracking.rows import numbers

FLUSH_S = 10
EVENTS = "events.out.tfevents.*"


def check(params: TensorBoardParams) -> None:
    """Raises UserError for a folder that cannot be written."""
    if "://" in params.folder:
        raise UserError("must be a folder of this machine", where="tracking.tensorboard.folder", remedy="give a path")


class TensorBoardRun:
    """Implements about.Tracker. Its folder, once it is open: <folder>/<stage>/<run>."""

    name = "tensorboard"

    def __init__(self, params: TensorBoardParams, about: About):
        self._wanted, self._about = params.folder, about
        self.last, self.moved = 0, ""
        self._writer: Any = None

    def open(self) -> None:
        from tensorboardX import SummaryWriter

        above = place(self._wanted, self._about.experiment)
        if above != Path(self._wanted):
            self.moved = f"event files of TensorBoard are in {above}, and in storage when the stage is over"
        self.folder = above / self._about.stage / self._about.run
        for old in self.folder.glob(EVENTS):
            old.unlink()
        self._writer = SummaryWriter(str(self.folder), purge_step=1, flush_secs=FLUSH_S)

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        from tensorboardX.proto import summary_pb2

        summary: Any = summary_pb2  # its names are made when it is imported
        for row in rows:  # all values of a step in one record, so that no step is there by half
            values = [summary.Summary.Value(tag=tag, simple_value=value) for tag, value in numbers(row).items()]
            self._writer.file_writer.add_summary(summary.Summary(value=values), row["step"])
            self.last = row["step"]

    def finish(self, done: bool) -> None:
        self._writer.close()
        store = self._about.store
        prefix = f"experiments/{self._about.experiment}/tensorboard/{self._about.stage}/{self._about.run}"
        written = {f"{prefix}/{path.name}": path for path in self.folder.glob(EVENTS)}
        for key, path in written.items():
            store.put_file(key, path)
        for key in store.list(f"{prefix}/"):
            if key not in written:  # of an earlier driver
                store.delete(key)
