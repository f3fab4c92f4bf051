"""What `run` would do with every stage, and why: a pure reading of the specification and of storage.

Invariants: a stage is reused or resumed only from a folder whose identity.json is its whole identity, not only the
16 digits that name the folder; planning writes nothing; where sources are absent nothing is guessed.
The mapping `<storage>/experiments/<name>/stages/<stage>.json` remembers what a stage name last meant, so that a
plan can name the field that changed.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from modeling import presets
from modeling.errors import UserError
from orchestrator.fingerprint import (
    Identity,
    absent_source,
    canonical,
    fingerprint,
    fp16,
    source_digest_of,
    stage_identities,
)
from orchestrator.graph import topological_order
from orchestrator.ledger import Ledger, StageState
from orchestrator.spec import Experiment, Stage
from orchestrator.store import Exists, Missing, Store

Action = Literal["run", "reuse", "resume", "share", "blocked", "unknown"]


@dataclass(frozen=True)
class StagePlan:
    """step: where a resumed stage goes on, in optimizer steps. changed: "field: before → now", by name of field.
    shared: the stage of this experiment, first in the order, that is the same one and makes the result."""

    name: str
    kind: str
    fingerprint: str | None
    action: Action
    step: int | None = None
    reason: str = ""
    changed: tuple[str, ...] = ()
    shared: str | None = None

    @property
    def prefix(self) -> str:
        assert self.fingerprint is not None, f"{self.name} has no fingerprint yet"
        return stage_prefix(self.kind, self.fingerprint)


def stage_prefix(base: str, digest: str) -> str:
    """The folder of a stage in the store. base: Kind.base."""
    return f"stages/{base}/{fp16(digest)}"


def make_plan(
    experiment: Experiment,
    identities: dict[str, Identity | None],
    store: Store | None,
    previous: dict[str, Identity] | None = None,
) -> list[StagePlan]:
    """One entry per stage, parents first. store: None plans as if nothing was ever run. StagePlan.kind: Kind.base.

    Raises UserError for a stage folder of another identity, or a ledger that cannot be read.
    """
    plans: dict[str, StagePlan] = {}
    first: dict[str, StagePlan] = {}  # by fingerprint
    for name in topological_order(experiment.needs):
        stage, identity = experiment.stages[name], identities[name]
        digest = None if identity is None else fingerprint(identity)
        if digest in first:
            plans[name] = _shared(name, first[digest])
            continue
        parents = [plans[need] for need in stage.params.needs]
        plans[name] = _plan_stage(experiment, stage, identity, parents, store, (previous or {}).get(name))
        if digest is not None:
            first[digest] = plans[name]
    return list(plans.values())


def _shared(name: str, maker: StagePlan) -> StagePlan:
    """The plan of a stage that is the same one as `maker`."""
    done = maker.action == "reuse"
    reason = f"{'completed, ' if done else ''}shared with {maker.name}"
    return replace(maker, name=name, action="reuse" if done else "share", step=None, reason=reason, changed=(),
                   shared=maker.name)  # fmt: skip


def _plan_stage(
    experiment: Experiment, stage: Stage, identity: Identity | None, parents: list[StagePlan], store: Store | None,
    before: Identity | None,
) -> StagePlan:  # fmt: skip
    name, base = stage.name, stage.kind.base
    if identity is None:
        for parent in parents:
            if parent.fingerprint is None:
                return StagePlan(name, base, None, "blocked", reason=f"needs {parent.name}, unknown until prepare")
        return StagePlan(name, base, None, "unknown", reason=f"unknown until prepare: {_absent(experiment, stage)}")
    digest = fingerprint(identity)
    changed = () if before is None else tuple(differences(before, identity))
    state = read_state(store, base, identity) if store is not None else None
    if state is not None and state.status == "completed":
        return StagePlan(name, base, digest, "reuse", reason="completed")
    if state is not None and state.checkpoints:
        step = state.checkpoints[0].step
        return StagePlan(name, base, digest, "resume", step, f"from the checkpoint of step {step}", changed)
    coming = [parent.name for parent in parents if parent.action in ("run", "resume", "share")]
    if changed:
        reason = f"changed: {', '.join(changed)}"
    elif coming:
        reason = f"needs {', '.join(coming)}, which will run"
    elif state is None or state.status == "new":
        reason = "not run yet"
    elif state.failures:
        last = state.failures[-1]
        reason = f"ended before its first checkpoint: {last.error_class} {last.message}".strip()
    else:
        reason = "started before, without a checkpoint"
    return StagePlan(name, base, digest, "run", reason=reason, changed=changed)


def _absent(experiment: Experiment, stage: Stage) -> str:
    """Which input of a stage without a known identity is not there."""
    if stage.kind.base == "prepare":
        mixture = stage.params.data
        source = absent_source(experiment.data[mixture].meta, experiment.data[mixture].endpoint_url)
        if source is not None:
            return f"no file {source} (data.{mixture})"
    model = experiment.model_of(stage)
    folders = presets.given(model)
    absent = {field: folders[field] for field, folder in presets.folders(model).items() if not folder.is_dir()}
    key = next((f"models.{name}" for name, its in experiment.models.items() if its is model), "model")
    named = " and ".join(f"{folder} ({key}.{field})" for field, folder in (absent or folders).items())
    return f"no folder {named}" if absent else f"config, weights or tokenizer are missing in {named}"


def read_state(store: Store, base: str, identity: Identity) -> StageState | None:
    """What storage knows of the stage; None where it has no folder. UserError where the folder is another's."""
    prefix = stage_prefix(base, fingerprint(identity))
    try:
        data = store.get(f"{prefix}/identity.json")
    except Missing:
        return None
    if data != canonical(identity).encode():
        raise UserError("this folder was made by a stage of another identity", where=f"{store.url}/{prefix}",
                        remedy="move the folder away; the stage will run anew")  # fmt: skip
    return Ledger(store, prefix).state()


def write_identity(store: Store, base: str, identity: Identity) -> str:
    """Makes the stage's folder its own before anything else is written there. Returns its prefix."""
    prefix = stage_prefix(base, fingerprint(identity))
    try:
        store.put(f"{prefix}/identity.json", canonical(identity).encode(), create=True)
    except Exists:
        read_state(store, base, identity)
    return prefix


def differences(before: Identity, now: Identity) -> list[str]:
    """The fields in which two identities differ, without their parents': ["lr: 4e-05 → 1e-05"]."""
    old, new = _flat(before), _flat(now)
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [
        "the data" if name == "sources" else f"{name}: {_show(old.get(name))} → {_show(new.get(name))}"
        for name in names
    ]


def _flat(identity: Identity) -> dict[str, Any]:
    out: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)
        else:
            out[name] = canonical(value)

    for key, value in identity.items():
        if key == "sources":
            out[key] = canonical(value)
        elif key != "parents":
            walk(value, "" if key == "params" else key)
    return out


def _show(text: str | None) -> str:
    value = None if text is None else json.loads(text)
    shown = "none" if value is None else str(value)
    return f"{shown[:12]}..." if len(shown) == 64 and set(shown) <= set("0123456789abcdef") else shown


def _mapping(experiment_name: str, stage: str = "") -> str:
    return f"experiments/{experiment_name}/stages/" + (f"{stage}.json" if stage else "")


def record_mapping(store: Store, experiment_name: str, stage: str, identity: Identity, digest: str) -> None:
    """Remembers what this stage name means now."""
    body = {"fingerprint": digest, "identity": identity}
    store.put(_mapping(experiment_name, stage), canonical(body).encode())


def read_mappings(store: Store, experiment_name: str) -> dict[str, dict[str, Any]]:
    """By stage name: {fingerprint, identity} as last recorded. UserError for a damaged file."""
    out = {}
    for key in store.list(_mapping(experiment_name)):
        try:
            body = json.loads(store.get(key))
            out[key.rpartition("/")[2].removesuffix(".json")] = {
                "fingerprint": body["fingerprint"], "identity": body["identity"],
            }  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"a damaged record ({error!r})", where=f"{store.url}/{key}",
                            remedy="delete this file; it only serves to name changes") from None  # fmt: skip
    return out


def read_previous(store: Store, experiment_name: str) -> dict[str, Identity]:
    """The identities alone, as make_plan takes them."""
    return {name: body["identity"] for name, body in read_mappings(store, experiment_name).items()}


def plan_experiment(experiment: Experiment, store: Store | None) -> tuple[dict[str, Identity | None], list[StagePlan]]:
    """(identities, plan) from the sources and the storage as they are now."""
    identities = stage_identities(experiment, source_digest_of(experiment))
    previous = read_previous(store, experiment.name) if store else None
    return identities, make_plan(experiment, identities, store, previous)
