"""Two laws, fitted robustly, and how sure they are: loss against sizes and data, accuracy against samples.

    L(N_v, N_l, D) = E + A / N_v^a + B / N_l^b + C / D^c            (Law, fit_law)
    accuracy(n)    = p - q * n^-r                                     (Curve, fit_curve)

The first is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) with a term for the vision encoder:
Huber loss on the residuals of log L, L-BFGS from many starts. Invariant: no value without a band. They are bootstrapped
over residuals, widened by sqrt(n / (n - k)) for the k parameters that the residuals were fitted with: resampling points
would tear holes into a grid of a few values an axis. A term whose axis has fewer than three values is left out, and
said to be; with fewer than k + 2 points, or axes that grow together, there is no law at all (Undetermined).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, least_squares, minimize

AXES = ("vision", "language", "data")
LETTERS = {"vision": "A", "language": "B", "data": "C"}
STEEPEST = 4.0  # largest exponent that is looked for
LEAST_VALUES = 3  # of an axis, for its term
MOST_CONDITION = 10.0  # of the axes' logs, each of one length: two of them correlate by .98
FINALISTS = 3  # of the starts, followed to the end
ROUGH = 0.1  # the Huber loss's delta until then


class Undetermined(ValueError):
    """The points do not determine the law."""


@dataclass(frozen=True)
class Law:
    """theta: log E, then log of the term at the axes' geometric mean and its exponent, for each of `terms`.

    refits: theta of each bootstrap sample [B, k]. residuals: of log L, widened. centre: log of the geometric means.
    """

    terms: tuple[str, ...]
    left_out: dict[str, str]  # axis -> why it has no term
    centre: dict[str, float]
    theta: np.ndarray
    refits: np.ndarray
    residuals: np.ndarray
    band: float
    ranges: dict[str, tuple[float, float]]  # of the points it was fitted on, also of axes without a term

    def predict(self, point: Mapping[str, float], *, measured: bool = True) -> tuple[float, float, float]:
        """(loss, low, high) at {axis: value}. measured: the band of a loss as it would be measured there, with the
        scatter of one run; else that of the law."""
        x = self._logs([point])
        value = float(np.exp(_log_loss(self.theta, x))[0])
        logs = np.concatenate([_log_loss(theta, x) for theta in self.refits])
        if measured:
            logs = (logs[:, None] + self.residuals[None, :]).ravel()
        low, high = np.exp(np.quantile(logs, [(1 - self.band) / 2, (1 + self.band) / 2]))
        return value, float(min(low, value)), float(max(high, value))

    def outside(self, point: Mapping[str, float]) -> list[str]:
        """The axes along which a point lies beyond the points of the fit."""
        return [a for a in AXES if not self.ranges[a][0] <= point[a] <= self.ranges[a][1]]

    def coefficients(self) -> dict[str, dict[str, float]]:
        """{E, A, a, ...: {value, low, high}} as the formula has them."""
        rows = np.array([self._plain(theta) for theta in self.refits])
        low, high = np.quantile(rows, [(1 - self.band) / 2, (1 + self.band) / 2], axis=0)
        names = ["E", *(n for a in self.terms for n in (LETTERS[a], LETTERS[a].lower()))]
        values = self._plain(self.theta)
        return {
            n: {"value": float(v), "low": float(lo), "high": float(hi)}
            for n, v, lo, hi in zip(names, values, low, high, strict=True)
        }

    def _plain(self, theta: np.ndarray) -> list[float]:
        out = [float(np.exp(theta[0]))]
        for i, axis in enumerate(self.terms):
            scale, exponent = theta[1 + 2 * i], theta[2 + 2 * i]
            out += [float(np.exp(scale + exponent * self.centre[axis])), float(exponent)]
        return out

    def _logs(self, points: Sequence[Mapping[str, float]]) -> np.ndarray:
        return np.array([[np.log(point[a]) - self.centre[a] for a in self.terms] for point in points])


def fit_law(
    points: Sequence[Mapping[str, float]],
    losses: Sequence[float],
    *,
    delta: float = 1e-3,
    starts: int = 64,
    refits: int = 200,
    band: float = 0.95,
    seed: int = 0,
) -> Law:
    """points: {axis: a positive number} of each; losses: nats per token, positive. Raises Undetermined."""
    log_loss, n = np.log(np.asarray(losses, float)), len(points)
    columns = {axis: np.log([float(point[axis]) for point in points]) for axis in AXES}
    values = {axis: len(np.unique(column)) for axis, column in columns.items()}
    left_out = {
        axis: f"{count} value{'s' * (count != 1)}, and a term needs {LEAST_VALUES}"
        for axis, count in values.items()
        if count < LEAST_VALUES
    }
    terms = tuple(axis for axis in AXES if axis not in left_out)
    if not terms:
        why = "; ".join(f"{axis}: {text}" for axis, text in left_out.items())
        raise Undetermined(f"no axis has {LEAST_VALUES} values ({why})")
    k = 1 + 2 * len(terms)
    if n < k + 2:
        raise Undetermined(f"{n} points for {k} parameters ({', '.join(terms)}), and at least {k + 2} are needed")
    centre = {axis: float(columns[axis].mean()) for axis in terms}
    x = np.stack([columns[axis] - centre[axis] for axis in terms], axis=1)
    _check_apart(x, terms)
    rng = np.random.default_rng(seed)
    valleys = _descend(x, log_loss, delta, _starts(rng, starts, len(terms), log_loss))
    theta = valleys[0]
    others = [one for one in valleys[1:] if not np.allclose(one, theta, rtol=1e-2, atol=1e-2)]
    fitted = _log_loss(theta, x)
    residuals = (log_loss - fitted) * np.sqrt(n / (n - k))
    samples = []
    for _ in range(refits):
        drawn = fitted + rng.choice(residuals, n)
        samples.append(_descend(x, drawn, delta, [theta, *others])[0])
    ranges = {axis: (min(point[axis] for point in points), max(point[axis] for point in points)) for axis in AXES}
    return Law(terms, left_out, centre, theta, np.array(samples), residuals, band, ranges)


def _check_apart(x: np.ndarray, terms: tuple[str, ...]) -> None:
    """Raises Undetermined where axes grow together: what one of them does cannot be told from what the other does."""
    lengths = x / np.linalg.norm(x, axis=0)
    if np.linalg.cond(lengths) <= MOST_CONDITION:
        return
    alike = lengths.T @ lengths
    i, j = divmod(int(np.argmax(np.abs(np.triu(alike, 1)))), len(terms))
    raise Undetermined(
        f"{' and '.join(terms)} do not vary independently ({terms[i]} and {terms[j]} correlate by {alike[i, j]:.2f})"
    )


def _log_loss(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log L [n] at centred logs x [n, terms]."""
    return _total(_parts(theta, x))


def _parts(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """log of each summand [n, 1 + terms]."""
    return np.concatenate([np.full((len(x), 1), theta[0]), theta[1::2] - theta[2::2] * x], axis=1)


def _total(parts: np.ndarray) -> np.ndarray:
    """log of the sum of what `parts` are the logs of [n]; scipy's logsumexp takes ten times as long on so few."""
    top = parts.max(axis=1)
    return top + np.log(np.exp(parts - top[:, None]).sum(axis=1))


def _objective(theta: np.ndarray, x: np.ndarray, log_loss: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """Σ huber(log L predicted - measured) / delta, and its gradient; divided by delta, lest L-BFGS stop at once."""
    parts = _parts(theta, x)
    total = _total(parts)
    shares = np.exp(parts - total[:, None])  # of each summand in L: the derivative of log L by its log
    residual = total - log_loss
    inside = np.abs(residual) <= delta
    loss = np.where(inside, residual**2 / 2, delta * (np.abs(residual) - delta / 2))
    slope = np.clip(residual, -delta, delta)[:, None] * shares
    gradient = np.empty_like(theta)
    gradient[0] = slope[:, 0].sum()
    gradient[1::2] = slope[:, 1:].sum(0)
    gradient[2::2] = -(slope[:, 1:] * x).sum(0)
    return float(loss.sum() / delta), gradient / delta


def _starts(rng: np.random.Generator, count: int, terms: int, log_loss: np.ndarray) -> list[np.ndarray]:
    """E between nothing and the lowest loss, the rest dealt out to the terms, exponents up to 2."""
    out, lowest, middle = [], float(log_loss.min()), float(np.median(log_loss))
    for _ in range(count):
        kept = rng.uniform(0.02, 0.98)
        rest = max(np.exp(middle) - kept * np.exp(lowest), 1e-3 * np.exp(middle))
        theta = np.empty(1 + 2 * terms)
        theta[0] = np.log(kept) + lowest
        theta[1::2] = np.log(rest * rng.dirichlet(np.ones(terms)) + 1e-6)
        theta[2::2] = rng.uniform(0.02, 2.0, terms)
        out.append(theta)
    return out


def _descend(x: np.ndarray, log_loss: np.ndarray, delta: float, starts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """theta at the ends of the most promising starts, the best one first."""
    top = float(log_loss.max())
    bounds = [(top - 20, top), *((top - 20, top + 5), (0.0, STEEPEST)) * x.shape[1]]
    low, high = np.array(bounds).T

    def descend(start: np.ndarray, width: float, steps: int) -> OptimizeResult:
        return minimize(
            _objective, np.clip(start, low, high), (x, log_loss, width), method="L-BFGS-B", jac=True, bounds=bounds,
            options={"maxiter": steps},
        )  # fmt: skip

    if len(starts) > FINALISTS:  # a wide Huber loss is smooth, and leads into the same valleys
        rough = sorted((descend(start, ROUGH, 60) for start in starts), key=lambda result: result.fun)
        starts = [result.x for result in rough[:FINALISTS]]
    found = sorted((descend(start, delta, 500) for start in starts), key=lambda result: result.fun)
    return [result.x for result in found]


@dataclass(frozen=True)
class Curve:
    """theta: (p, q, r); refits: of each bootstrap sample [B, 3]. largest: the most samples that were measured."""

    theta: np.ndarray
    refits: np.ndarray
    band: float
    largest: float

    def coefficients(self) -> dict[str, dict[str, float]]:
        """{limit, gap, exponent: {value, low, high}}: p, q and r."""
        low, high = np.quantile(self.refits, [(1 - self.band) / 2, (1 + self.band) / 2], axis=0)
        names = ("limit", "gap", "exponent")
        return {
            n: {"value": float(v), "low": float(lo), "high": float(hi)}
            for n, v, lo, hi in zip(names, self.theta, low, high, strict=True)
        }

    def predict(self, samples: float) -> tuple[float, float, float]:
        """(accuracy, low, high) of the law with so many samples of each question."""
        value = float(_accuracy(self.theta, np.array([samples]))[0])
        drawn = np.concatenate([_accuracy(theta, np.array([samples])) for theta in self.refits])
        low, high = np.quantile(drawn, [(1 - self.band) / 2, (1 + self.band) / 2])
        return value, float(max(0.0, min(low, value))), float(min(1.0, max(high, value)))


def fit_curve(
    samples: Sequence[float],
    accuracy: Sequence[float],
    errors: Sequence[float],
    *,
    refits: int = 200,
    band: float = 0.95,
    seed: int = 0,
) -> Curve:
    """errors: standard errors of the accuracies. Raises Undetermined for fewer than four points.

    All points of a curve are of the same questions, so they err together: a bootstrap sample shifts the whole curve by
    one draw, and adds residuals of the fit for its shape.
    """
    x, y = np.asarray(samples, float), np.asarray(accuracy, float)
    if len(np.unique(x)) < 4:
        raise Undetermined(f"{len(np.unique(x))} numbers of samples for 3 parameters, and at least 4 are needed")
    error = np.maximum(np.asarray(errors, float), 1e-4)
    theta = _fit_curve(x, y, error)
    fitted = _accuracy(theta, x)
    residuals = (y - fitted) * np.sqrt(len(x) / (len(x) - 3))
    rng = np.random.default_rng(seed)
    drawn = [fitted + rng.normal() * error + rng.choice(residuals, len(x)) for _ in range(refits)]
    return Curve(theta, np.array([_fit_curve(x, one, error, theta) for one in drawn]), band, float(x.max()))


def _accuracy(theta: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return theta[0] - theta[1] * samples ** -theta[2]


def _fit_curve(x: np.ndarray, y: np.ndarray, error: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """q may be below zero: votes can hurt."""
    low, high = np.array([0.0, -1.0, 0.05]), np.array([1.0, 1.0, 4.0])
    starts = [start] if start is not None else [np.array([y[-1], y[-1] - y[0], r]) for r in (0.3, 0.7, 1.5)]
    inside = [np.clip(one, low + 1e-6, high - 1e-6) for one in starts]
    found = [least_squares(lambda t: (_accuracy(t, x) - y) / error, one, bounds=(low, high)) for one in inside]
    return min(found, key=lambda result: result.cost).x
