"""What a running stage writes beside its ledger for people to look at: metrics rows, log lines, a progress note.

None of it is truth: the ledger is. Object stores cannot append, so metrics are segments per attempt,
`metrics/<token>-<first step>.jsonl`; readers keep the surviving lineage: of two rows of a step the later attempt's, and
none beyond the step a later attempt resumed from (design.md, "What a user sees").
"""

import json
import time
from typing import Any

from orchestrator.store import Missing, Store

REFRESH_S = 1.0  # between two progress notes
SEGMENT_S = 15.0  # between two metrics segments


def token_name(token: tuple[int, int]) -> str:
    return f"e{token[0]:04d}a{token[1]:04d}"


class Recorder:
    """The writer of one attempt."""

    def __init__(self, store: Store, prefix: str, token: tuple[int, int], log_name: str = ""):
        self._store, self._prefix, self._token = store, prefix, token
        self._name = token_name(token)
        self._log_name = log_name or self._name
        self._rows: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._noted = 0.0
        self._segment_at = time.monotonic()
        self._began: tuple[float, int] | None = None

    def log(self, message: str) -> None:
        self._lines += [f"{time.strftime('%H:%M:%S')} {line}" for line in message.splitlines()]
        self._store.put(f"{self._prefix}/logs/{self._log_name}.log", ("\n".join(self._lines) + "\n").encode())

    def row(self, step: int, total: int, row: dict[str, Any]) -> None:
        """Keep a row; write the progress note and a segment when they are due."""
        self._rows.append({"step": step, "attempt": self._name, **row})
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        if now - self._noted >= REFRESH_S or step >= total:
            self._noted = now
            done = step - self._began[1]
            eta = (now - self._began[0]) / done * (total - step) if done else None
            note = {
                "token": list(self._token),
                "step": step,
                "total": total,
                "eta_s": eta,
                "row": row,
                "time": time.time(),
            }
            self._store.put(f"{self._prefix}/progress.json", json.dumps(note).encode())
        if now - self._segment_at >= SEGMENT_S:
            self.flush()

    def flush(self) -> None:
        """Store the rows kept so far as one segment."""
        if self._rows:
            first = self._rows[0].get("step", 0)
            body = "".join(json.dumps(row) + "\n" for row in self._rows)
            self._store.put(f"{self._prefix}/metrics/{self._name}-{first:08d}.jsonl", body.encode())
            self._rows = []
        self._segment_at = time.monotonic()


def read_progress(store: Store, prefix: str) -> dict[str, Any] | None:
    """The last progress note, or None."""
    try:
        return json.loads(store.get(f"{prefix}/progress.json"))
    except Missing:
        return None


def read_logs(store: Store, prefix: str) -> dict[str, str]:
    """Log texts by name, in the order of the attempts."""
    return {key.rsplit("/", 1)[1]: store.get(key).decode() for key in store.list(f"{prefix}/logs/")}


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
