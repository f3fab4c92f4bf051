"""What must hold in every interleaving, judged by one who sees every effect on the store in its order.

The observer keeps its own account of the ledger, of what counts and of every append by its caller; it asks neither the
ledger's fold nor any actor what is true. INVARIANTS names what it looks for.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from simulation_kernel import Kernel

from orchestrator.ledger import Entry, Token

INVARIANTS = {
    "entries last": "a ledger entry is never changed or deleted, and no number is left out",
    "returned appends count": "an append that returned is in the ledger once, as asked, and its token was the newest",
    "refused appends do nothing": "an append that was fenced is not in the ledger, now or later",
    "one entry each": "no append ends as two entries",
    "one claim each": "no epoch is claimed twice, none after the result",
    "one attempt each": "no token is given to two attempts; a commit is of the attempt that has its token",
    "commits are whole": "what an entry commits is in the store at that moment: all pieces of one attempt and step",
    "what counts stays": "no file of a checkpoint that counts, or of the result, is changed or removed",
    "no step is lost": "every commit is further on than all before it (damage aside)",
    "the newest stay": "while the stage trains, only what is beyond `keep` is retired",
    "one result": "one `completed`, whose files are the state of an undisturbed training",
    "resumed as left": "an attempt resumes from the state that the training has at that step, the newest that counts",
    "no surprise": "no actor meets an error that nothing in its world explains",
    "progress": "a last driver that nothing happens to finishes",
    "nothing is left": "once all have ended, gc leaves nothing but what a stage keeps for ever",
}
FOR_EVER = ("identity.json", "ledger/", "result/", "logs/", "heartbeat/", "control/")


@dataclass
class Call:
    """One append by its caller, and the entries it led to."""

    kind: str
    fields: dict[str, Any]
    owner: str
    landed: list[int] = field(default_factory=list)
    refused: bool = False


@dataclass
class Account:
    """What the ledger says, entry by entry as they land. files: by key, the manifest of the checkpoint that counts."""

    entries: list[bytes] = field(default_factory=list)
    newest: Token = (0, 0)
    newest_before: list[Token] = field(default_factory=list)  # by number, of all entries before it
    epochs: set[int] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)  # manifest -> step
    files: dict[str, str] = field(default_factory=dict)
    furthest: int = 0
    result: str | None = None  # folder


class Checks:
    """prefix: of the stage. chain: the state after each step of an undisturbed training."""

    def __init__(self, kernel: Kernel, prefix: str, chain: list[str]):
        self.kernel, self.prefix, self.chain, self.keep = kernel, prefix, chain, 1
        self.now = Account()
        self.attempts: dict[Token, int] = {}  # by token, the attempt that a driver started with it
        self.damaged: set[str] = set()
        self.objects: dict[str, bytes] = {}  # of the store

    def fail(self, name: str, text: str) -> None:
        assert name in INVARIANTS, name
        self.kernel.violations.append(f"{name}: {text}")

    # -- effects on the store --------------------------------------------------------------------------

    def put(self, key: str, data: bytes, call: Call | None) -> None:
        if key.startswith(f"{self.prefix}/ledger/"):
            self._entry(key, data, call)
        elif self.objects.get(key, data) != data:
            self._touched(key, "changed")

    def delete(self, key: str, by: str) -> None:
        if key.startswith(f"{self.prefix}/ledger/"):
            self.fail("entries last", f"{key} is deleted")
        if "/checkpoints/" in key or "/result/" in key:
            self.kernel.counts["removed"] += 1
        if by == "gc":
            self.kernel.counts["removed by gc"] += 1
        self._touched(key, "removed")

    def _touched(self, key: str, what: str) -> None:
        if key in self.now.files:
            self.fail("what counts stays", f"{key} is {what} while {self.now.files[key]} counts")
        if self.now.result is not None and key.startswith(self.now.result + "/"):
            self.fail("what counts stays", f"{key} of the result is {what}")

    def _entry(self, key: str, data: bytes, call: Call | None) -> None:
        now, body = self.now, json.loads(data)
        if key in self.objects:
            return self.fail("entries last", f"{key} is written again")
        number = len(now.entries)
        if key != f"{self.prefix}/ledger/{number:08d}.json":
            return self.fail("entries last", f"{key} comes when {number} is the next number")
        now.entries.append(data)
        now.newest_before.append(now.newest)
        if call is not None:
            call.landed.append(number)
            if len(call.landed) > 1:
                self.fail("one entry each", f"{call.kind} of {call.owner} is in the ledger as {call.landed}")
            if call.refused:
                self.fail("refused appends do nothing", f"{call.kind} of {call.owner} landed as {number} after all")
        token = tuple(body["token"])
        if token >= now.newest:
            now.newest = token
            self._counts(body, token)

    def _counts(self, body: dict[str, Any], token: Token) -> None:
        now, kind = self.now, body["type"]
        if kind == "claimed":
            if token[0] in now.epochs or now.result is not None:
                self.fail("one claim each", f"{token} is claimed, after {sorted(now.epochs)} and {now.result}")
            now.epochs.add(token[0])
            self.kernel.counts["takeovers"] += token[0] > 1
        elif kind == "checkpoint":
            self._checkpoint(body["manifest"], body["step"], token)
        elif kind == "retired":
            now.counted.pop(body["manifest"], None)
            now.files = {key: manifest for key, manifest in now.files.items() if manifest != body["manifest"]}
            if now.result is None and len(now.counted) < self.keep:
                self.fail("the newest stay", f"{body['manifest']} is retired, {len(now.counted)} are left")
        elif kind == "completed":
            self._completed(body["manifest"]["folder"], token)

    def _checkpoint(self, manifest: str, step: int, token: Token) -> None:
        now = self.now
        self.kernel.counts["commits"] += 1
        if step <= now.furthest and not self.damaged:
            self.fail("no step is lost", f"step {step} is committed when {now.furthest} was")
        if manifest in now.counted:
            self.fail("one entry each", f"{manifest} is committed twice")
        now.furthest = max(now.furthest, step)
        folder = manifest.rsplit("/", 1)[0]
        try:
            lines = json.loads(self.objects[manifest])["files"]
            files = {f"{folder}/{line['name']}": line["sha256"] for line in lines}
            wrong = [key for key, digest in files.items() if hashlib.sha256(self.objects[key]).hexdigest() != digest]
            pieces = sorted((json.loads(self.objects[key]) for key in files), key=lambda piece: piece["rank"])
        except KeyError as error:
            return self.fail("commits are whole", f"{manifest} is committed without {error}")
        now.counted[manifest] = step
        now.files |= {key: manifest for key in (manifest, *files)}
        told = {(piece["attempt"], piece["step"], piece["world"]) for piece in pieces}
        state = "".join(piece["piece"] for piece in pieces)
        if wrong or told != {(self.attempts.get(token), step, len(pieces))} or state != self.chain[step]:
            self.fail("commits are whole", f"{manifest} of step {step}: {wrong} damaged, pieces of {told}")

    def _completed(self, folder: str, token: Token) -> None:
        if self.now.result is not None:
            return self.fail("one result", f"{folder} is the result after {self.now.result}")
        self.now.result = folder
        content = self.objects.get(f"{folder}/model")
        if content is None or json.loads(content) != {"attempt": self.attempts.get(token), "state": self.chain[-1]}:
            self.fail("one result", f"{folder}/model is {content!r}")

    # -- what actors tell ------------------------------------------------------------------------------

    def returned(self, call: Call, entry: Entry) -> None:
        number, wanted = entry.number, (call.kind, call.fields)
        if call.landed != [number] or (entry.type, entry.fields) != wanted:
            self.fail("returned appends count", f"{wanted} of {call.owner} returned as {entry}; landed {call.landed}")
            return
        before = self.now.newest_before[number]
        if before > entry.token:
            self.fail("returned appends count", f"{wanted} of {call.owner} returned, but {before} is newer")

    def refused(self, call: Call) -> None:
        call.refused = True
        if call.landed:
            self.fail("refused appends do nothing", f"{call.kind} of {call.owner} is entry {call.landed}")

    def started(self, token: Token, attempt: int) -> None:
        if token in self.attempts:
            self.fail("one attempt each", f"{token} is attempt {self.attempts[token]} and {attempt}")
        self.attempts[token] = attempt

    def resumed(self, token: Token, step: int, state: str) -> None:
        if state != self.chain[step]:
            self.fail("resumed as left", f"{token} resumed step {step} with another state")
        if token == self.now.newest and not self.damaged and step != max(self.now.counted.values(), default=0):
            self.fail("resumed as left", f"{token} resumed from step {step}, and {self.now.counted} count")

    def read(self, entries: list[Entry]) -> None:
        """A reader saw these entries."""
        seen = [(entry.type, list(entry.token), entry.nonce) for entry in entries]
        there = [(b["type"], b["token"], b["nonce"]) for b in map(json.loads, self.now.entries[: len(seen)])]
        if seen != there:
            self.fail("entries last", f"a reader saw {len(seen)} entries that are not the ledger's first")

    # -- damage, and the end ---------------------------------------------------------------------------

    def damage(self) -> None:
        """One bit of a file of the newest checkpoint that counts flips."""
        if self.now.counted:
            manifest = max(self.now.counted, key=lambda name: self.now.counted[name])
            key = self.kernel.rng.choice([key for key, of in self.now.files.items() if of == manifest])
            data = bytearray(self.objects[key])
            data[self.kernel.rng.randrange(len(data))] ^= 1
            self.objects[key] = bytes(data)
            self.damaged.add(manifest)
            self.kernel.counts["damaged"] += 1

    def at_end(self) -> None:
        """After a gc that nothing happened to, when all others have ended."""
        now = self.now
        stored = sorted(key for key in self.objects if key.startswith(f"{self.prefix}/ledger/"))
        if [self.objects[key] for key in stored] != now.entries:
            self.fail("entries last", f"{len(stored)} entries are stored, {len(now.entries)} were written")
        if now.counted:
            self.fail("nothing is left", f"{sorted(now.counted)} count after gc")
        for key in sorted(self.objects):
            name = key.removeprefix(self.prefix + "/")
            other = name.startswith("result/") and now.result is not None and not key.startswith(now.result + "/")
            old = name.startswith("heartbeat/") and int(name[10:-5]) < now.newest[0]
            if key.startswith(self.prefix) and (other or old or not name.startswith(FOR_EVER)):
                self.fail("nothing is left", f"{key} is there after gc")
