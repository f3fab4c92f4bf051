"""A scaling study over evaluated models: loss against sizes and data, accuracy against test-time compute.

Every figure is one that an evaluation measured: a point is (N_vision, N_language, D) with the loss and the accuracies
of one evaluation. N are all parameters of the vision encoder and of the language model (embeddings and head included,
the projector in neither), D what the evaluated stage itself trained on, not the stages before it. Invariant: the points
that the law is to predict are set aside before anything is fitted, and every point says in the result which it was; a
law that the points do not determine is refused with the reason, and nothing is predicted without a band. Which points
are held out, and what is fitted, does not depend on the order in which they are named.

Result: scaling.json, points.csv, loss.svg; predicted.svg where there is a law, test_time.svg where samples were drawn.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from modeling.errors import DataError
from stages.io import Input, StageIO
from stages.scaling_fit import AXES, LEAST_VALUES, Law, Undetermined, fit_curve, fit_law
from stages.scaling_plot import draw_losses, draw_predictions, draw_test_time

EVALUATION = "evaluation.json"
Z = 1.959964  # two-sided 95 %, as the intervals of an evaluation

Point = dict[str, Any]


def scaling(io: StageIO) -> None:
    """Read the evaluations, fit, predict what was left out, and store all of it."""
    params = io.params
    found = [read_point(item, params.task, params.data, params.prompt) for item in distinct(io.inputs)]
    points, aside = parted(found)
    ordered = sorted(points, key=lambda point: point["fingerprint"])
    for point, part in zip(ordered, roles(ordered, params.holdout, params.seed), strict=True):
        point["part"] = part
    law, refused = None, ""
    try:
        law = _fitted(ordered, params)
    except Undetermined as error:
        refused = str(error)
    curves = [curve for point in points for curve in test_time(point, params)]
    described = describe(law, points) if law else {"refused": refused}  # which adds to the points
    told = {
        "points": [{k: v for k, v in point.items() if k != "curves"} for point in points],
        "set_aside": aside,
        "task": params.task, "data": params.data, "band": params.band,
        "law": described,
        "curves": curves,
    }  # fmt: skip
    folder = io.scratch / "result"
    folder.mkdir()
    (folder / "scaling.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    write_csv(folder / "points.csv", points)
    drawings = {"loss.svg": draw_losses(points, law, params.data)}
    if law is not None:
        drawings["predicted.svg"] = draw_predictions(points, law)
    if curves:
        drawings["test_time.svg"] = draw_test_time(curves)
    for name, drawing in drawings.items():
        (folder / name).write_text(drawing, encoding="utf-8")
    for line in lines(told):
        io.log(line)
    io.complete(folder, {key: told[key] for key in ("task", "data", "band", "law")} | {"points": len(points)})


def distinct(inputs: dict[str, Input]) -> list[Input]:
    """The evaluations, each once: names that share one result are one point."""
    return list({item.fingerprint: item for item in reversed(list(inputs.values()))}.values())[::-1]


def read_point(item: Input, task: str, data: str, prompt: str | None) -> Point:
    """One evaluation as a point. Raises DataError where it has not what a point needs."""
    found = json.loads((item.folder / EVALUATION).read_text())
    where = f"stages.{item.name}"
    if len(asked := found.get("checkpoints") or ()) > 1:
        raise DataError(
            f"asks {len(asked)} checkpoints ({', '.join(asked)}), and a point is one of them", where=where,
            remedy="need evaluations of one trained stage each",
        )  # fmt: skip
    trained = found.get("trained")
    if trained is None:
        raise DataError(
            f"what its model '{found.get('stage')}' was trained on is not known", where=where,
            remedy="it is no trained stage, or one of an earlier version: train it anew in another 'storage:'",
        )  # fmt: skip
    loss = found.get("loss") or {}
    if task not in loss:
        known = f"has {', '.join(loss)}" if loss else "has none: set 'loss: true', and need prepared data"
        raise DataError(f"has no loss of task '{task}'", where=where, remedy=f"choose another 'task:'; it {known}")
    tables = found["tables"]
    if prompt is not None and prompt not in tables:
        raise DataError(f"has no prompt '{prompt}'", where=where, remedy=f"choose one of {', '.join(tables)}")
    table = tables[prompt or next(iter(tables))]
    return {
        "evaluation": item.name, "fingerprint": item.fingerprint, "stage": found["stage"],
        "vision": found["parameters"]["vision"], "language": found["parameters"]["language"], "data": trained[data],
        "samples": trained["samples"], "tokens": trained["tokens"], "steps": trained["steps"],
        "fraction": trained["fraction"], "loss": loss[task]["nats"], "loss_tokens": loss[task]["tokens"],
        "accuracy": {name: {key: row[key] for key in ("accuracy", "low", "high", "n")} for name, row in table.items()},
        "curves": found.get("curves") or {},
    }  # fmt: skip


def parted(points: list[Point]) -> tuple[list[Point], list[dict[str, Any]]]:
    """(points that can be used, those of runs that diverged and why). Raises DataError where none can be used."""
    used, aside = [], []
    for point in points:
        loss = point["loss"]
        if isinstance(loss, int | float) and math.isfinite(loss) and loss > 0:
            used.append(point)
            continue
        reason = f"its loss is {loss}, and a law of it needs a number above 0"
        aside.append({"evaluation": point["evaluation"], "stage": point["stage"], "reason": reason})
    if not used:
        raise DataError(
            f"no loss can be used: {aside[0]['reason']}", where=f"stages.{aside[0]['evaluation']}",
            remedy="look at the training of what it evaluates (stageline report), e.g. with a lower lr",
        )  # fmt: skip
    return used, aside


def roles(points: list[Point], holdout: Any, seed: int) -> list[str]:
    """The part of each point, `fit` or `held out`: the largest is held out, and some drawn from the rest; at most a
    quarter of all, and none that takes an axis below the values that its term needs. Largest: by the product of its
    axes, so of a grid the corner with the most of everything."""
    ranks = np.array([[point[axis] for axis in AXES] for point in points], float)
    ranks = ranks / ranks.max(axis=0)
    order = np.lexsort((np.arange(len(points)), ranks.prod(axis=1)))
    out, rest, most = ["fit"] * len(points), list(order), len(points) // 4

    def spared(i: int) -> bool:
        kept = [point for j, point in enumerate(points) if j != i and out[j] == "fit"]
        counts = [(len({p[axis] for p in points}), len({p[axis] for p in kept})) for axis in AXES]
        return all(left >= LEAST_VALUES or values < LEAST_VALUES for values, left in counts)

    if holdout.largest and most and (largest := next(filter(spared, reversed(rest)), None)) is not None:
        out[largest] = "held out"
        rest.remove(largest)
    drawn = min(holdout.random, most - out.count("held out"))
    for i in np.random.default_rng(seed).permutation(len(rest)):
        if drawn > 0 and spared(rest[i]):
            out[rest[i]] = "held out"
            drawn -= 1
    return out


def _fitted(points: list[Point], params: Any) -> Law:
    used = [point for point in points if point["part"] == "fit"]
    return fit_law(
        used, [point["loss"] for point in used], delta=params.huber_delta, starts=params.starts, refits=params.refits,
        band=params.band, seed=params.seed,
    )  # fmt: skip


def describe(law: Law, points: list[Point]) -> dict[str, Any]:
    """The law for scaling.json: coefficients, what was left out, and how well held-out points were predicted."""
    held = []
    for point in points:
        value, low, high = law.predict(point)
        point |= {"predicted": value, "predicted_low": low, "predicted_high": high}
        if point["part"] == "held out":
            held.append({
                "evaluation": point["evaluation"], "loss": point["loss"], "predicted": value, "low": low, "high": high,
                "relative_error": value / point["loss"] - 1, "inside": low <= point["loss"] <= high,
                "beyond": law.outside(point),
            })  # fmt: skip
    errors = [abs(row["relative_error"]) for row in held]
    return {
        "formula": formula(law), "coefficients": law.coefficients(), "left_out": law.left_out,
        "fitted_on": [point["evaluation"] for point in points if point["part"] == "fit"],
        "residual": float(np.sqrt(np.mean(law.residuals**2))),
        "held_out": held,
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        "inside": sum(row["inside"] for row in held),
    }  # fmt: skip


def formula(law: Law) -> str:
    terms = {"vision": "A / N_vision^a", "language": "B / N_language^b", "data": "C / D^c"}
    return " + ".join(["L = E", *(terms[axis] for axis in law.terms)])


def test_time(point: Point, params: Any) -> list[dict[str, Any]]:
    """Each curve accuracy against samples, with its fit, or why there is none."""
    out = []
    for task, found in point["curves"].items():
        for row in found:
            told = {"evaluation": point["evaluation"], "stage": point["stage"], "task": task, **row}
            errors = [(high - low) / (2 * Z) for low, high in zip(row["low"], row["high"], strict=True)]
            try:
                curve = fit_curve(
                    row["samples"], row["accuracy"], errors, refits=params.refits, band=params.band, seed=params.seed
                )
            except Undetermined as error:
                out.append(told | {"fit": {"refused": str(error)}})
                continue
            at = np.geomspace(min(row["samples"]), 4 * max(row["samples"]), 25).tolist()
            values = [curve.predict(samples) for samples in at]
            names = ("accuracy", "low", "high")
            drawn = {name: [value[i] for value in values] for i, name in enumerate(names)}
            found = curve.coefficients()
            theta = {name: its["value"] for name, its in found.items()}
            bands = {name: [its["low"], its["high"]] for name, its in found.items()}
            fit = theta | {"bands": bands, "samples": at, "measured_to": curve.largest, **drawn}
            out.append(told | {"fit": fit})
    return out


def write_csv(path: Path, points: list[Point]) -> None:
    """One row a point; accuracies as accuracy/<task>."""
    tasks = list(dict.fromkeys(task for point in points for task in point["accuracy"]))
    plain = [key for key in points[0] if key not in ("accuracy", "curves")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *(f"accuracy/{task}" for task in tasks)])
        for point in points:
            shares = [point["accuracy"].get(task, {}).get("accuracy", "") for task in tasks]
            writer.writerow([*(point.get(key, "") for key in plain), *shares])


def lines(told: dict[str, Any]) -> list[str]:
    """For the log."""
    law, points = told["law"], told["points"]
    held = sum(point["part"] == "held out" for point in points)
    out = [f"{len(points)} points, {held} of them held out; loss of {told['task']}, D in {told['data']}"]
    out += [f"set aside {row['evaluation']}: {row['reason']}" for row in told["set_aside"]]
    if "refused" in law:
        return [*out, f"no law of the loss: {law['refused']}"]
    out.append(law["formula"])
    for name, c in law["coefficients"].items():
        out.append(f"{name} = {c['value']:.4g} [{c['low']:.4g}, {c['high']:.4g}]")
    out += [f"no term for {axis}: {why}" for axis, why in law["left_out"].items()]
    for row in law["held_out"]:
        beyond = f", beyond the fit's {' and '.join(row['beyond'])}" if row["beyond"] else ""
        out.append(
            f"held out {row['evaluation']}: predicted {row['predicted']:.4f} [{row['low']:.4f}, {row['high']:.4f}], "
            f"measured {row['loss']:.4f} ({row['relative_error']:+.1%}{beyond})"
        )
    if law["held_out"]:
        out.append(
            f"mean error of the prediction {law['mean_relative_error']:.1%}; {law['inside']} of {len(law['held_out'])} "
            f"within their {told['band']:.0%} bands"
        )
    return out
