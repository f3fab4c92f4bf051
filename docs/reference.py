"""The reference pages of every YAML key and of every command, written from the models and the parser themselves.

    python docs/reference.py        # writes docs/reference-experiment.md and docs/reference-commands.md

Invariant: a page says nothing that the code does not: types, limits, defaults, meanings and whether a key is part of a
stage's identity come from the pydantic models, verbs and options from argparse. Only the top of the file, which is read
by hand (orchestrator/spec.py), has its words here; a test holds both pages to the code.
"""

import argparse
import inspect
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.shape import ClusterParams
from orchestrator.cli.main import parser
from orchestrator.spec import DEFAULT_KEYS, TOP_KEYS
from orchestrator.tracking.params import TrackingParams
from stages.evaluation import EvalSet
from stages.kinds import KINDS, MANY
from stages.params import DataParams, EvaluateParams, ExportParams, ModelParams, PrepareParams, ScalingParams
from stages.params import TrainParams as Train

DOCS = Path(__file__).parent
Group = type[BaseModel]

# key -> (type, default, meaning); the groups among them have sections of their own
TOP = {
    "name": ("text of a-z, 0-9, _ and -", "required", "what `status` and the records in storage call the experiment"),
    "storage": (
        "text, or `{url, endpoint_url}`",
        "required",
        "a folder, relative to the YAML file, or `s3://bucket/prefix` ([storage.md](storage.md))",
    ),
    "seed": ("integer ≥ 0", "`0`", "of every stage that gives none of its own"),
    "model": ("[model](#model)", "none", "of the stages that name none"),
    "models": ("mapping of a name to [model](#model)", "none", "further models, which stages name by `model:`"),
    "data": ("mapping of a name to [data](#data)", "none", "mixtures, which `prepare` stages name by `data:`"),
    "eval": ("mapping of a name to [eval](#eval)", "none", "evaluation sets, which `evaluate` stages name by `sets:`"),
    "sweep": (
        "mapping of an axis to a list",
        "none",
        'one stage for each combination of values; `"${axis}"` stands for one ([scaling.md](scaling.md))',
    ),
    "defaults": ("mapping", "none", "settings of every training stage that does not give them itself: {defaults}"),
    "stages": ("mapping of a name to a stage", "required", "what is done: [kinds of stage](#kinds-of-stage)"),
    "tracking": ("[tracking](#tracking)", "none", "where metrics go besides storage; never part of what a stage is"),
    "cluster": ("[cluster](#cluster)", "none", "machines and prices ([cluster.md](cluster.md)); as `tracking`"),
}  # fmt: skip

# (title, model), in the order of the page; groups inside follow the model that has them first
SECTIONS: tuple[tuple[str, Group], ...] = (
    ("model", ModelParams), ("data", DataParams), ("eval", EvalSet), ("kind: prepare", PrepareParams),
    ("kind: train", Train), ("kind: evaluate", EvaluateParams), ("kind: scaling", ScalingParams),
    ("kind: export", ExportParams), ("tracking", TrackingParams), ("cluster", ClusterParams),
)  # fmt: skip
NEVER = (TrackingParams, ClusterParams)  # no key in them is part of what a stage is

_NOTE = "<!-- written by docs/reference.py: change the models, not this page -->\n"
_HEAD = """# Every key of an experiment

{note}
Written from the models that read the file. *Identity*: **yes**, a change makes another stage, which runs anew; **no**,
a change only alters how it runs: what is done stays done, what was begun goes on; **if given**, as *yes* where it is
not the default. Names of other things (`needs`, `model`, `sets`) are no identity, what they name is. A key that is not
listed is refused, with the nearest one that is.

How to put a file together: [experiment.md](experiment.md).

## The file

| key | type | default | |
|---|---|---|---|
{top}

## Kinds of stage

A stage is `name: {{kind: ..., needs: [...], ...}}`; where its name is that of a kind, `kind:` may be left out. Each
kind has the keys of its section; the four trainings differ in what `train:` is.

| kind | section | `train` | needs |
|---|---|---|---|
{kinds}
"""


def experiment_page() -> str:
    """The page of every key, as Markdown. Raises ValueError where TOP and the reader's own keys differ."""
    if set(TOP) != set(TOP_KEYS):
        raise ValueError(f"docs/reference.py describes {sorted(TOP)}, orchestrator/spec.py reads {sorted(TOP_KEYS)}")
    defaults = ", ".join(f"`{key}`" for key in DEFAULT_KEYS)
    top = "\n".join(f"| `{key}` | {kind} | {default} | {text.replace('{defaults}', defaults)} |"
                    for key, (kind, default, text) in TOP.items())  # fmt: skip
    head = _HEAD.format(note=_NOTE, top=top, kinds="\n".join(map(_kind, KINDS)))
    return "\n".join([head, *(_section(model, title, counts) for model, (title, counts) in _walk().items())]) + "\n"


def undescribed() -> list[str]:
    """Keys without words: neither a description, nor a group of settings with a docstring of its own."""
    found = []
    for model in _walk():
        found += [] if _doc(model) else [model.__name__]
        for name, info in model.model_fields.items():
            inner = _groups(info.annotation)
            if not info.description and not (inner and all(map(_doc, inner))):
                found.append(f"{model.__name__}.{name}")
    return sorted(found)


def _kind(name: str) -> str:
    kind = KINDS[name]
    needs = []
    for parent, (least, most) in kind.parents.items():
        count = f"{least}" if least == most else f"{least} or more" if most == MANY else f"{least} to {most}"
        needs.append(f"{count} {parent}")
    trains = ", ".join(kind.defaults.get("train", ("as given",))) if kind.trains else ""
    section = f"[kind: {kind.base}](#kind-{kind.base})"
    return f"| `{name}` | {section} | {trains} | {', '.join(needs) or 'none'} |"


def _walk() -> dict[Group, tuple[str, bool]]:
    """model -> (title, whether its keys are identity), in the order of the page; where it comes first counts."""
    found: dict[Group, tuple[str, bool]] = {}

    def visit(title: str, model: Group, counts: bool) -> None:
        if model in found:
            return
        found[model] = (title, counts)
        above = "" if title.startswith("kind: ") else f"{title}."  # a group of a stage is called by its own key
        for name, info in model.model_fields.items():
            for group in _groups(info.annotation):
                visit(above + name, group, counts and _rule(info) != "no")

    for title, model in SECTIONS:
        visit(title, model, model not in NEVER)
    return found


def _section(model: Group, title: str, counts: bool) -> str:
    rows = []
    for name, info in model.model_fields.items():
        text = info.description or " ".join(map(_doc, _groups(info.annotation)))
        shown = _type(info.annotation, info.metadata)
        rows.append(f"| `{name}` | {shown} | {_default(info)} | {_cell(text)} | {_rule(info) if counts else 'no'} |")
    doc = _doc(model)
    head = [
        "",
        f"## {title}",
        "",
        doc[:1].upper() + doc[1:],
        "",
        "| key | type | default | | identity |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def _rule(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    rule = extra.get("identity") if isinstance(extra, dict) else None
    return "no" if rule is False else "if given" if rule == "unless default" else "yes"


def _doc(model: Group) -> str:
    """The first paragraph of a model's own docstring, without the key that some begin with; "" where it has none."""
    text = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return text.split(" — ", 1)[-1].replace("``", "`")


def _groups(annotation: Any) -> list[Group]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for inner in get_args(annotation) for group in _groups(inner)]


def _type(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        members = [_type(inner) for inner in arguments if inner is not type(None)]
        return " or ".join(dict.fromkeys(members)) + _limits(metadata)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"[{', '.join(map(_type, arguments))}]"
    if origin is dict:
        return f"mapping of a name to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        title = _walk()[annotation][0]
        return f"[{title}](#{_slug(title)})"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", Any: "anything"}
    return names[annotation] + _limits(metadata)


def _limits(metadata: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    metadata = [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]
    found = [
        f" {sign} {getattr(one, name):g}" for one in metadata for name, sign in signs.items() if hasattr(one, name)
    ]
    return ",".join(found)


def _slug(title: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, dict) and any(isinstance(inner, BaseModel) for inner in value.values()):
        return f"`{{{', '.join(f'{key}: {{}}' for key in value)}}}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands_page() -> str:
    """The page of every verb, its arguments and its options, as Markdown."""
    top = parser()
    out = [f"# Every command\n\n{_NOTE}\n{top.description}\n", _EXIT]
    for name, sub, text in _verbs(top, "stageline"):
        out.append(_verb(name, sub, text))
    return "\n".join(out)


_EXIT = """Exit codes: 0 done; 1 a bug of ours or a lost machine, with a traceback; 2 something of yours to mend, in one
message ([troubleshooting.md](troubleshooting.md)); 130 interrupted, run again to go on.

`OVERRIDES` are settings on top of the file: `stages.full_finetune.lr=1e-4`, `data.heldout.meta=other.json`,
`'sweep.vision=[tiny-vit]'`.
"""


def unexplained() -> list[str]:
    """Arguments and options without help."""
    return [f"{name} {_name(action)}" for name, sub, _ in _verbs(parser(), "stageline") for action in _actions(sub)
            if not action.help]  # fmt: skip


def _verbs(top: argparse.ArgumentParser, prefix: str) -> list[tuple[str, argparse.ArgumentParser, str]]:
    """(full name, parser, what it does) of every verb that is no group of verbs, in the order of the help."""
    out = []
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help for choice in action._choices_actions}
            for name, sub in action.choices.items():
                inner = _verbs(sub, f"{prefix} {name}")
                out += inner or [(f"{prefix} {name}", sub, str(texts.get(name) or ""))]
    return out


def _actions(sub: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in sub._actions if not isinstance(action, argparse._HelpAction)]


def _verb(name: str, sub: argparse.ArgumentParser, text: str) -> str:
    usage, rows = [name], []
    for action in _actions(sub):
        shown = _name(action)
        many = {"*": f"[{shown} ...]", "+": f"{shown} [{shown} ...]", "?": f"[{shown}]"}
        if not action.option_strings:
            usage.append(many.get(str(action.nargs), shown))
        elif action.required:
            usage.append(shown)
        limits = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
        rows.append(f"| `{_cell(shown)}` | {_cell((action.help or '') % _values(sub, action))}{limits} |")
    options = any(action.option_strings and not action.required for action in _actions(sub))
    call = " ".join(usage) + (" [options]" if options else "")
    table = "\n".join(["| | |", "|---|---|", *rows])
    return f"## {name}\n\n{text[:1].upper()}{text[1:]}.\n\n```text\n{call}\n```\n\n{table}\n"


def _values(sub: argparse.ArgumentParser, action: argparse.Action) -> dict[str, Any]:
    """What argparse fills into a help text: %(default)s, %(prog)s ..."""
    return {"prog": sub.prog, **vars(action)}


def _name(action: argparse.Action) -> str:
    value = str(action.metavar or action.dest).upper()
    if not action.option_strings:
        return value
    if action.choices:
        value = "|".join(map(str, action.choices))
    flags = ", ".join(action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {value}"


PAGES = {"reference-experiment.md": experiment_page, "reference-commands.md": commands_page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


if __name__ == "__main__":
    main()
