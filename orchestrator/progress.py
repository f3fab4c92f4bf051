"""What a running stage writes beside its ledger for people to look at: metrics rows, log lines, a progress note.

None of it is truth: the ledger is. Object stores cannot append, so metrics are segments per attempt,
`metrics/<token>-<first step>.jsonl`; readers keep the surviving lineage: of two rows of a step the later attempt's, and
none beyond the step a later attempt resumed from (design.md, "What a user sees").
"""

import json
import threading
import time
from typing import Any

from orchestrator.checkpoints import token_name
from orchestrator.ledger import Token
from orchestrator.redaction import redact
from orchestrator.store import Missing, Store

REFRESH_S = 1.0  # between two progress notes
SEGMENT_S = 15.0  # between two metrics segments
# of a training stage's row: the note has their sums over the attempt, for who sees no other row (observe/meters.py)
SUMMED = ("time/step", "time/data_wait", "time/checkpoint_stall", "tokens")


class Recorder:
    """The writer of one attempt. row() and log() only keep, where `behind` is set: a thread calls write()."""

    def __init__(self, store: Store, prefix: str, token: Token, log_name: str = ""):
        self._store, self._prefix, self._token = store, prefix, token
        self._name = token_name(token)
        self._log_name = log_name or self._name
        self.behind = False
        self._kept = threading.Lock()  # the three below
        self._rows: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._note: dict[str, Any] | None = None
        self._writing = threading.Lock()
        self._logged = 0
        self._noted, self._segment_at = 0.0, time.monotonic()
        self._began: tuple[float, int] | None = None
        self._sums: dict[str, float] = {}

    def log(self, message: str) -> None:
        with self._kept:
            self._lines += [f"{time.strftime('%H:%M:%S')} {line}" for line in redact(message).splitlines()]
        if not self.behind:
            self._write_log()

    def row(self, step: int, total: int, row: dict[str, Any]) -> None:
        """Keep a row; the progress note tells of the newest."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        done = step - self._began[1]
        if "time/step" in row:
            self._sums = {key: self._sums.get(key, 0.0) + row.get(key, 0.0) for key in SUMMED}
        note = {
            "token": list(self._token),
            "step": step,
            "total": total,
            "eta_s": (now - self._began[0]) / done * (total - step) if done else None,
            "row": row,
            "sums": dict(self._sums),
            "time": time.time(),
        }
        with self._kept:
            self._rows.append({"step": step, "attempt": self._name, **row})
            self._note = note

    def write(self) -> None:
        """Store what is due: new log lines, the progress note every second, a segment of rows every 15."""
        now = time.monotonic()
        self._write_log()
        if now - self._noted >= REFRESH_S:
            self._write_note()
        if now - self._segment_at >= SEGMENT_S:
            self._write_rows()

    def flush(self) -> None:
        """Store all that was kept so far."""
        self._write_log()
        self._write_note()
        self._write_rows()

    def _write_log(self) -> None:
        with self._writing:
            with self._kept:
                lines = list(self._lines)
            if len(lines) > self._logged:
                self._store.put(f"{self._prefix}/logs/{self._log_name}.log", ("\n".join(lines) + "\n").encode())
                self._logged = len(lines)

    def _write_note(self) -> None:
        with self._writing:
            self._noted = time.monotonic()
            with self._kept:
                note = self._note
            if note is not None:
                self._store.put(f"{self._prefix}/progress.json", json.dumps(note).encode())
                with self._kept:
                    self._note = None if self._note is note else self._note

    def _write_rows(self) -> None:
        with self._writing:
            self._segment_at = time.monotonic()
            with self._kept:
                rows = list(self._rows)
            if rows:
                key = f"{self._prefix}/metrics/{self._name}-{rows[0]['step']:08d}.jsonl"
                self._store.put(key, "".join(json.dumps(row) + "\n" for row in rows).encode())
                with self._kept:
                    del self._rows[: len(rows)]


def read_progress(store: Store, prefix: str) -> dict[str, Any] | None:
    """The last progress note, or None."""
    try:
        return json.loads(store.get(f"{prefix}/progress.json"))
    except Missing:
        return None


def read_logs(store: Store, prefix: str) -> dict[str, str]:
    """Log texts by name, in the order of the attempts."""
    return {key.rsplit("/", 1)[1]: store.get(key).decode() for key in list_logs(store, prefix)}


def list_logs(store: Store, prefix: str) -> list[str]:
    """Their keys, in the order of the attempts."""
    return store.list(f"{prefix}/logs/")


def read_metrics(store: Store, prefix: str) -> list[dict[str, Any]]:
    """The rows of the surviving lineage, one per step, in order."""
    rows: dict[int, dict[str, Any]] = {}
    seen_token = ""
    for key in store.list(f"{prefix}/metrics/"):  # sorted: by token, then by first step
        token = key.rsplit("/", 1)[1].split("-")[0]
        segment = [json.loads(line) for line in store.get(key).decode().splitlines()]
        if token != seen_token and segment:
            seen_token = token
            rows = {step: row for step, row in rows.items() if step < segment[0]["step"]}
        rows.update((row["step"], row) for row in segment)
    return [rows[step] for step in sorted(rows)]
