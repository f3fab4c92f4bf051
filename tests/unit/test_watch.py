"""What a running experiment prints: every log line once, and no log of an attempt that is long over read again."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from orchestrator.cli.watch import Watch, console_for_output
from orchestrator.ledger import Ledger
from orchestrator.progress import Recorder
from orchestrator.store import MemoryStore

P = "stages/train/0123456789abcdef"


class Counting(MemoryStore):
    def __init__(self):
        super().__init__()
        self.read: list[str] = []

    def get(self, key):
        self.read.append(key)
        return super().get(key)


def test_each_line_is_told_once_and_old_logs_are_left_alone(monkeypatch):
    monkeypatch.setattr("orchestrator.cli.watch.READ_S", -1.0)
    store, out = Counting(), io.StringIO()
    watch, ledger = Watch(store, {"mlp": P}, Console(file=out, width=200)), Ledger(store, P)
    store.put(f"{P}/logs/e0000a0001.log", b"00:00:00 long ago\n")
    token = ledger.claim({"host": "h"})
    for number in range(1, 4):
        token = ledger.start_attempt(token, 1)
        recorder = Recorder(store, P, token)
        for line in ("first", "second"):
            watch({"mlp"})
            recorder.log(f"{line} line of attempt {number}")
        store.put(f"{P}/logs/e0001a000{number}-error.log", b"a long traceback")
        store.put(f"{P}/logs/e0001a000{number}-stacks-rank00000.log", b"no step came to an end")
        watch({"mlp"})
    watch({"mlp"})
    told = out.getvalue()
    for number in range(1, 4):
        for line in ("first", "second"):
            assert told.count(f"mlp: {line} line of attempt {number}") == 1
    assert "long ago" not in told and "traceback" not in told and "end" not in told
    store.read.clear()
    watch({"mlp"})
    assert [key for key in store.read if "/logs/" in key] == [f"{P}/logs/e0001a0003.log"]


@pytest.mark.parametrize("text", ["bug: [/data/x.json] has no field", "[bold]no style[/bold]", "a :warning: [0]"])
def test_no_text_is_markup(text, capsys):
    """An error's, that of another's job: not in a table, its title or a plain line."""
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console = console_for_output()
    console.print(table)
    console.print(text)
    assert capsys.readouterr().out.count(text) == 4
