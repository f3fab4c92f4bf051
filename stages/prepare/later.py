"""The steps of curation that look at all samples that are left: copies, contamination, scores.

Invariants: a step sees what the steps before it have left; a set that is exempt from a step is not looked at, and what
a person said to keep stays. Memory of the driver: 600 bytes a sample and 360 a picture while copies are looked for
(twice the signatures, whose parts are put together), else a few bytes for each sample that is rejected.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling.errors import DataError
from modeling.index import INDEX
from modeling.meta import read_meta
from stages.curation import Curation, Duplicates
from stages.io import Folder, StageIO
from stages.prepare.assemble import Late, table_of
from stages.prepare.chunks import Part, look_again
from stages.prepare.measuring import chunks_of, measured
from stages.prepare.parts import SIGNATURES


@dataclass
class Mixture:
    """The samples that are left, numbered over all parts. starts [parts + 1]: of each part's."""

    parts: Sequence[Part]
    folder: Folder
    scratch: Path

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum([part.kept for part in self.parts], dtype=np.int64)])
        self.left = np.ones(self.starts[-1], bool)
        self.found: dict[int, tuple[str, str, str]] = {}  # number -> step, reason, detail

    def reject(self, numbers: np.ndarray, step: str, reason: str, details: Sequence[str]) -> None:
        self.left[numbers] = False
        self.found |= {int(number): (step, reason, detail) for number, detail in zip(numbers, details, strict=True)}

    def seen(self, exempt: Sequence[str], pardoned: np.ndarray) -> np.ndarray:
        """The numbers of those that a step looks at."""
        seen = self.left & ~pardoned
        for i, part in enumerate(self.parts):
            if part.dataset in exempt:
                seen[self.starts[i] : self.starts[i + 1]] = False
        return np.flatnonzero(seen)

    def column(self, read: Callable[[Part], Any]) -> list[Any]:
        return [read(part) for part in self.parts if part.kept]

    def names(self, numbers: np.ndarray) -> dict[int, str]:
        """How messages name samples: one pass over the parts that hold them."""
        out = {}
        wanted = np.unique(numbers)
        for i, part in enumerate(self.parts):
            inside = wanted[(wanted >= self.starts[i]) & (wanted < self.starts[i + 1])]
            if len(inside):
                table = table_of(part, INDEX, self.folder, self.scratch).select(["id", "file", "line"])
                for number, row in zip(inside, table.take(inside - self.starts[i]).to_pylist()):
                    out[int(number)] = f"{row['id']} ({row['file']}:{row['line']})"
        return out

    def late(self) -> dict[int, Late]:
        """What was rejected, by part."""
        out: dict[int, Late] = {}
        for number in sorted(self.found):
            i = int(np.searchsorted(self.starts, number, side="right")) - 1
            late = out.setdefault(self.parts[i].number, Late([], [], [], []))
            late.rows.append(number - int(self.starts[i]))
            for values, value in zip((late.step, late.reason, late.detail), self.found[number]):
                values.append(value)
        return out


def look_at_all(
    io: StageIO, parts: Sequence[Part], folder: Folder, reviewed: Mapping[str, str]
) -> tuple[dict[int, Late], dict[int, pa.Table]]:
    """(rejected samples, scores of the kept ones), each by part."""
    curate: Curation = io.params.curate
    mixture = Mixture(parts, folder, io.scratch / "late")
    pardoned = _pardoned(mixture, reviewed)
    if curate.duplicates or curate.contamination:
        _copies(io, mixture, curate, pardoned)
    scores: dict[int, pa.Table] = {}
    if curate.scores:
        from stages.prepare.score_parts import score_parts

        scores = score_parts(io, mixture, curate, pardoned)
    return mixture.late(), scores


def _pardoned(mixture: Mixture, reviewed: Mapping[str, str]) -> np.ndarray:
    """bool [samples]: those that a person said to keep."""
    kept = [digest for digest, verdict in reviewed.items() if verdict == "keep"]
    if not kept:
        return np.zeros(mixture.starts[-1], bool)

    def read(part: Part) -> np.ndarray:
        table = table_of(part, "verdicts.parquet", mixture.folder, mixture.scratch)
        digests = table.filter(pc.field("verdict") == "kept")["digest"].to_numpy()
        return np.isin(digests.astype(str), kept)

    return np.concatenate([np.zeros(0, bool), *mixture.column(read)])


def _copies(io: StageIO, mixture: Mixture, curate: Curation, pardoned: np.ndarray) -> None:
    from stages.prepare.duplicates import find_contaminated, find_duplicates

    signatures = _signatures(mixture)
    if curate.duplicates:
        # a verdict to keep a sample speaks for all with its content: one of them is enough
        seen = mixture.seen(curate.exempt.duplicates, np.zeros_like(pardoned))
        part = _taken(signatures, seen)
        of = find_duplicates(part, curate.duplicates)
        copies = np.flatnonzero(of >= 0)
        exact = (part.samples["digest"][copies] == part.samples["digest"][of[copies]]).all(axis=1)
        copies, exact = (values[exact | ~pardoned[seen[copies]]] for values in (copies, exact))
        names = mixture.names(seen[of[copies]])
        for same, reason in ((True, "duplicate"), (False, "near_duplicate")):
            chosen = copies[exact == same]
            details = [f"{'the same as' if same else 'nearly'} {names[int(seen[of[i]])]}" for i in chosen]
            mixture.reject(seen[chosen], "duplicates", reason, details)
        io.log(f"copies: {int(exact.sum())} exact, {int((~exact).sum())} near ones of {len(seen)} samples")
    if curate.contamination:
        for name in curate.contamination.against:
            other = _evaluation(io, name)
            seen = mixture.seen(curate.exempt.contamination, pardoned)
            of = find_contaminated(_taken(signatures, seen), _signatures(other), curate.contamination)
            found = np.flatnonzero(of >= 0)
            names = other.names(of[found])
            details = [f"in {name}: {names[int(of[i])]}" for i in found]
            mixture.reject(seen[found], "contamination", "contaminated", details)
            io.log(f"contamination: {len(found)} of {len(seen)} samples stand in {name} ({other.starts[-1]} samples)")


def _signatures(mixture: Mixture) -> Any:
    from stages.prepare.signatures import Signatures

    def read(part: Part) -> Signatures:
        return Signatures.load(mixture.folder.fetch(f"{part.folder}/{SIGNATURES}", mixture.scratch))

    return Signatures.concat(mixture.column(read))


def _taken(signatures: Any, numbers: np.ndarray) -> Any:
    """Those of some samples."""
    from stages.prepare.signatures import Signatures

    if len(numbers) == len(signatures):
        return signatures
    counts = signatures.samples["pictures"].astype(np.int64)
    wanted = np.zeros(len(signatures), bool)
    wanted[numbers] = True
    return Signatures(signatures.samples[numbers], signatures.pictures[np.repeat(wanted, counts)])


def _evaluation(io: StageIO, name: str) -> Mixture:
    """The samples of an evaluation set, with or without answers, of any length. Raises DataError where too many cannot
    be read: what is not compared would count as clean."""
    source = io.sources[name]
    params = io.params.model_copy(update={"curate": Curation(duplicates=Duplicates()), "data": name})
    folder = io.work_folder(f"parts/against/{name}")
    datasets = read_meta(source.meta, source.endpoint_url)
    chunks = list(chunks_of(datasets, io.model, params, source.system, io.scratch, questions=True))
    mixture = Mixture(list(measured(io, chunks, folder)), folder, io.scratch / "late")
    records = sum(part.records for part in mixture.parts)
    lost = records - int(mixture.starts[-1])
    if lost > io.params.max_rejected * records or not records:
        look_again(mixture.parts, folder)
        first = next((one for part in mixture.parts for one in part.first), None)
        place = f": {first['file']}:{first['line']} {first['reason']} ({first['detail']})" if first else ""
        raise DataError(
            f"{lost} of {records} records of the evaluation set {name} cannot be read{place}",
            where=f"stages.{io.stage}.curate.contamination", remedy="correct the set, or take it out of `against`",
        )  # fmt: skip
    return mixture
