"""What a running experiment looks like: one live line per stage on a terminal, plain lines elsewhere.

Reads storage alone, as `status` does: the progress notes and logs that the stages write (progress.py).
"""

import sys
import threading
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from orchestrator.checkpoints import token_name
from orchestrator.ledger import Ledger
from orchestrator.progress import list_logs, read_progress
from orchestrator.store import Store

READ_S = 0.5  # between two looks at storage
PLAIN_S = 10.0  # between two plain lines of a stage


def console_for_output() -> Console:
    """Wide enough for whole rows where no terminal sets a width, so that the output can be searched.

    No text is markup, in tables neither: errors and paths hold brackets, and others wrote the metadata of their jobs.
    """
    width = None if sys.stdout.isatty() else 220
    return Console(highlight=False, markup=False, emoji=False, width=width)


def duration(seconds: float) -> str:
    """'8 s', '3 min 05 s', '2 h 10 min'."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def tell(console: Console, stage: str, message: str) -> None:
    """From any thread: one line about a stage."""
    console.print(f"{time.strftime('%H:%M:%S')} {stage}: {message}", markup=False)


def line(note: dict | None, checkpoint: int | None) -> str:
    """step, loss, tokens/s, ETA and the last checkpoint of one stage."""
    if note is None:
        return "starting"
    row, total = note["row"], note["total"]
    parts = [f"{note['step']:,}/{total:,} ({note['step'] / max(total, 1):.0%})"]
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    if row.get("real_tokens_per_second") is not None:
        parts.append(f"{row['real_tokens_per_second']:,.0f} tokens/s")
    if note.get("eta_s") is not None and note["step"] < total:
        parts.append(f"ETA {duration(note['eta_s'])}")
    if checkpoint is not None:
        parts.append(f"checkpoint {checkpoint:,}")
    return "  ".join(parts)


class Watch:
    """Called by the scheduler with the running stages; prints what is new."""

    def __init__(self, store: Store, prefixes: dict[str, str], console: Console):
        self._store, self._prefixes, self._console = store, prefixes, console
        self._ledgers = {name: Ledger(store, prefix) for name, prefix in prefixes.items()}
        self._started: dict[str, float] = {}
        self._plain: dict[str, float] = {}
        self._shown: dict[str, int] = {}  # lines by key
        self._over: dict[str, set[str]] = {}  # logs that say nothing new any more
        self._read = 0.0
        self._lock = threading.Lock()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if sys.stdout.isatty() else None

    def __enter__(self) -> "Watch":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def event(self, stage: str, message: str) -> None:
        """From any thread: one line about a stage."""
        with self._lock:
            tell(self._console, stage, message)

    def __call__(self, running: set[str]) -> None:
        now = time.monotonic()
        ended = set(self._started) - running
        if now - self._read < READ_S and not ended and running <= set(self._started):
            return
        self._read = now
        for name in sorted(running - set(self._started), key=list(self._prefixes).index):
            self._started[name] = now
            self._over.setdefault(name, set(list_logs(self._store, self._prefixes[name])))
            self.event(name, "started")
        rows = {}
        for name in [name for name in self._prefixes if name in running | ended]:
            note = read_progress(self._store, self._prefixes[name])
            state = self._ledgers[name].state()
            self._new_log_lines(name, token_name(state.token))
            if note is not None and tuple(note["token"]) < state.token:
                note = None  # of an earlier attempt
            checkpoint = state.checkpoints[0].step if state.checkpoints else None
            rows[name] = line(note, checkpoint)
            if name in ended:
                took = duration(now - self._started.pop(name))
                self._plain.pop(name, None)
                word = "interrupted" if state.status in ("claimed", "running") else state.status
                self.event(name, f"{word} after {took}")
                rows.pop(name)
            elif self._live is None and note is not None and now - self._plain.get(name, -PLAIN_S) >= PLAIN_S:
                self._plain[name] = now
                self.event(name, rows[name])
        if self._live:
            table = Table(box=None, show_header=False, pad_edge=False)
            for name, text in rows.items():
                table.add_row(name, duration(now - self._started[name]), text)
            self._live.update(table)

    def _new_log_lines(self, name: str, newest: str) -> None:
        over = self._over[name]
        for key in list_logs(self._store, self._prefixes[name]):
            log = key.rsplit("/", 1)[1]
            if key in over:
                continue
            if log.endswith("-error.log") or "-stacks-" in log:  # the driver says what is in them
                over.add(key)
                continue
            lines = self._store.get(key).decode().splitlines()
            for new in lines[self._shown.get(key, 0) :]:
                self.event(name, new[9:])
            self._shown[key] = len(lines)
            if log < newest:  # of an attempt that is over, and read once more since
                over.add(key)
