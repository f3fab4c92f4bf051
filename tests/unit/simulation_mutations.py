"""One protection at a time taken out of the real code, to see that the simulation would notice.

A mutation is a change of the source of one function; where the text is no longer there, it fails rather than changes
nothing.
"""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import simulation_ranks
from simulation import World
from simulation_ranks import Group

from orchestrator import checkpoints, gc
from orchestrator.checkpoints import Checkpoints
from orchestrator.ledger import Ledger


@dataclass(frozen=True)
class Mutation:
    """owner: the class or module that has `name`."""

    what: str
    owner: Any
    name: str
    old: str
    new: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        function = inspect.unwrap(getattr(self.owner, self.name))
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.old) == 1, f"{self.what}: the text to change is not in {self.name} once"
        made: dict[str, Any] = {}
        exec(compile(source.replace(self.old, self.new), f"<{self.what}>", "exec"), function.__globals__, made)
        with patch.object(self.owner, self.name, made[self.name]):
            yield


_FENCED = "if self._state.token > token:"
_MANIFEST = "    self.store.put(key, json.dumps(manifest, indent=1).encode())\n"
_ENTRY = '    self.ledger.append("checkpoint", self.token, step=step, manifest=key, train_s=train_s)\n'
_RETIRED = '    ledger.append("retired", token, step=old.step, manifest=old.manifest)\n'
_REMOVED = '    remove_folder(store, old.manifest.rsplit("/", 1)[0])\n'
_CREATE = "self._create(self._key(number), json.dumps(body, allow_nan=False).encode())"
_LINE = '    line = checkpoints.put_shard(step, f"shard-{rank}", self.pieces[step][rank])\n'

MUTATIONS = (
    Mutation("the fencing test of append", Ledger, "append", _FENCED, "if False:"),
    Mutation("the fencing test of start_attempt", Ledger, "start_attempt", _FENCED, "if False:"),
    Mutation("the fencing test of claim", Ledger, "claim", "if self._state.token[0] > before:", "if False:"),
    Mutation("the attempt number", Ledger, "start_attempt", "return token[0], token[1] + 1", "return token"),
    Mutation("the create-only flag", Ledger, "_create", "create=True", "create=False"),
    Mutation("the manifest before its entry", Checkpoints, "commit", _MANIFEST + _ENTRY, _ENTRY + _MANIFEST),
    Mutation(
        "the shards before their manifest", Group, "_put_piece", _LINE,
        "    data = self.pieces[step][rank]\n"
        "    digest = hashlib.sha256(data).hexdigest()\n"
        '    self.lines[step][rank] = {"name": f"shard-{rank}", "size": len(data), "sha256": digest}\n' + _LINE,
    ),
    Mutation(
        "entries that outlast retention", checkpoints, "retire", _REMOVED,
        _REMOVED + "    number = next(e.number for e in ledger.entries() if e.fields.get('manifest') == old.manifest)\n"
        "    store.delete(f'{ledger.prefix}/ledger/{number:08d}.json')\n",
    ),
    Mutation(
        "entries that outlast gc", gc, "_collect", "    objects = total = 0\n",
        "    objects = total = 0\n"
        "    for entry in entries[:-1] if now.completed is not None else ():\n"
        "        store.delete(f'{prefix}/ledger/{entry.number:08d}.json')\n",
    ),
    Mutation("the nonce read back", Ledger, "_put", "if self._entries[number].nonce == nonce:", "if True:"),
    Mutation(
        "the recognition of an unanswered put", Ledger, "_put",
        "with suppress(Exists):  # taken, perhaps by our own put: reading tells\n            " + _CREATE,
        "try:\n            " + _CREATE + "\n        except Exists:\n            continue",
    ),
    Mutation("retention's `retired` before removal", checkpoints, "retire", _RETIRED + _REMOVED, _REMOVED + _RETIRED),
    Mutation("the token in the folder's name", checkpoints, "checkpoint_folder", "/{token_name(token)}", ""),
    Mutation("the refusal of a claim after the result", Ledger, "claim", "self._check_open()", "pass"),
    Mutation("the refusal of an attempt after the result", Ledger, "start_attempt", "self._check_open()", "pass"),
    Mutation("retention's regard for `keep`", Checkpoints, "commit", "[self.keep :]", "[self.keep - 1 :]"),
    Mutation("the digests verified on load", simulation_ranks, "verified", "sha256_of(path) != item", "'' == item"),
    Mutation("gc's regard for the newest token", gc, "_in_vain", "(part) < now.token", "(part) <= now.token"),
    Mutation("gc's regard for what counts", gc, "_in_vain", "(given_up and not counted)", "given_up"),
    Mutation("gc's regard for the result", gc, "_in_vain", ") and not used", ")"),
    Mutation("gc's `retired` before removal", gc, "_collect", "if now.completed is not None and", "if False and"),
)  # fmt: skip


def first_failure(seeds: range, mutation: Mutation) -> World | None:
    """The first world in which the mutated code breaks an invariant."""
    with mutation.applied():
        return next((world for seed in seeds if (world := World(seed).run()).violations), None)
