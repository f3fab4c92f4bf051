"""`prepare`: a mixture's sources -> shards with an index, every record kept or rejected with its reason.

Invariants: records = kept + rejected by reason; the result does not depend on the number of workers; nothing is handed
over unless every source was read to its end and the damaged share is at most `max_rejected` (design.md, "Data"). What
one attempt has read and measured, in parts of about a thousand records, the next one takes as it is.

The result: index.parquet, shards/*.tar, rejected.jsonl, summary.json. Beside it: verdicts.parquet (every record),
card.html, review.html, rejected.jsonl.
"""

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from modeling.errors import DataError
from modeling.meta import Dataset, read_meta
from modeling.parquet import open_parquet
from stages.curation import Curation
from stages.io import Folder, StageIO
from stages.params import PrepareParams
from stages.prepare import assemble
from stages.prepare.chunks import Part, look_again
from stages.prepare.later import look_at_all
from stages.prepare.measuring import chunks_of, measured
from stages.prepare.parts import VERDICTS
from stages.prepare.review import read_review
from stages.prepare.show import write_pages
from stages.prepare.summary import summarise

PLACES_SHOWN = 5
ITS_FOLDER = "the folder that `stageline status` names"


def prepare(io: StageIO) -> None:
    """Runs the stage. Raises DataError: no sources, no sample kept, a source that breaks off, or too many damaged."""
    params: PrepareParams = io.params
    source = io.sources[params.data]
    datasets = read_meta(source.meta, source.endpoint_url)
    _check_names(io.stage, params.curate, datasets)
    reviewed = read_review(Path(params.curate.review)) if params.curate.review else {}
    chunks = list(chunks_of(datasets, io.model, params, source.system, io.scratch))
    folder = io.work_folder("parts")
    parts = list(measured(io, chunks, folder, reviewed))
    out = io.scratch / "result"
    out.mkdir()
    keep = partial(_keep_rejected, io, parts, folder, out)
    _check_damage(parts, folder, io.stage, source.meta, params.max_rejected, keep)

    late, scores = look_at_all(io, parts, folder, reviewed)
    verdicts = _write_verdicts(io.scratch, parts, folder, late, scores)
    assemble.write_rejected(out / "rejected.jsonl", _batches(verdicts))
    io.keep("rejected.jsonl", out / "rejected.jsonl")
    io.keep("verdicts.parquet", verdicts)
    named = assemble.write_index(parts, folder, io.scratch, out, late)
    summary = summarise(datasets, _batches(verdicts), params.repeat)
    summary["shares"] = write_pages(io, parts, folder, verdicts, late, dict(reviewed))["shares"]
    _check_kept(summary, io.stage, source.meta)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for dataset in datasets:
        found = summary["datasets"][dataset.name]["samples"]
        if dataset.length is not None and dataset.length != found:
            io.log(f"{dataset.name}: the meta file says length {dataset.length}, {dataset.file} has {found} samples")
    stored = list(assemble.copy_shards(parts, folder, io.result_folder(), named))
    io.log(
        f"{summary['kept']} samples, {summary['tokens']} tokens ({summary['supervised']} supervised), "
        f"{summary['tiles']} tiles, {len(stored)} shards; {_told(summary['rejected'], summary['reasons'])}"
    )
    io.complete(out, summary, stored=stored)
    folder.clear()


def _write_verdicts(
    scratch: Path, parts: Sequence[Part], folder: Folder, late: dict[int, assemble.Late], scores: dict[int, pa.Table]
) -> Path:
    path = scratch / "verdicts.parquet"
    rows = assemble.Rows(path, VERDICTS)
    for part in parts:
        rows.add(assemble.verdicts_of(part, folder, scratch, late.get(part.number), scores.get(part.number)))
    rows.close()
    return path


def _batches(path: Path) -> Iterator[pa.Table]:
    with open_parquet(path, str(path)) as file:
        for batch in file.iter_batches():
            yield pa.Table.from_batches([batch])


def _keep_rejected(io: StageIO, parts: Sequence[Part], folder: Folder, out: Path) -> None:
    tables = (assemble.verdicts_of(part, folder, io.scratch, None, None) for part in parts)
    assemble.write_rejected(out / "rejected.jsonl", tables)
    io.keep("rejected.jsonl", out / "rejected.jsonl")


def _told(rejected: int, reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reason} {count}" for reason, count in Counter(reasons).most_common())
    return f"{rejected} rejected" + (f" ({listed})" if listed else "")


def _check_damage(
    parts: Sequence[Part], folder: Folder, stage: str, meta: str, max_rejected: float, keep: Callable[[], None]
) -> None:
    """What is wrong with the sources themselves; the steps of curation are not counted here."""
    where = f"stages.{stage}: {meta}"
    samples = sum(part.records for part in parts)
    if not samples:
        raise DataError("the annotations hold no sample", where=where, remedy="write one JSON object per line")
    damaged: Counter[str] = Counter()
    for part in parts:
        damaged.update(part.damage)
    broken = damaged["broken_file"]
    total = damaged.total()
    if total < samples and total / samples <= max_rejected and not broken:
        return
    keep()
    look_again(parts, folder)
    first = [one for part in parts for one in part.first]
    first.sort(key=lambda one: one["reason"] != "broken_file")
    shown = first[:PLACES_SHOWN]
    places = "; ".join(f"{one['file']}:{one['line']} {one['reason']} ({one['detail']})" for one in shown)
    more = f"; and {total - len(shown)} more" if total > len(shown) else ""
    if broken:
        message = f"{broken} files cannot be read to their end, what they hold beyond is unknown: {places}{more}"
        raise DataError(message, where=where, remedy="fetch these files again, or take them out of the meta file")
    share = f"{total / samples:.1%} of {samples} samples, max_rejected is {max_rejected:.1%}"
    message = f"{_told(total, damaged)}, {share}: {places}{more}"
    remedy = f"correct the samples (all are in rejected.jsonl of {ITS_FOLDER}) or raise stages.{stage}."
    raise DataError(message, where=where, remedy=remedy + "max_rejected" if total < samples else "correct the samples")


def _check_names(stage: str, curate: Curation, datasets: Sequence[Dataset]) -> None:
    """The sets that curation names are those of the meta file."""
    names = [dataset.name for dataset in datasets]
    given = {f"exempt.{step}": getattr(curate.exempt, step) for step in type(curate.exempt).model_fields}
    given["scores.domains"] = tuple(curate.scores.domains) if curate.scores else ()
    for key, sets in given.items():
        for one in sets:
            if one not in names:
                near = difflib.get_close_matches(one, names, 1)
                remedy = f"did you mean '{near[0]}'?" if near else f"the meta file has {', '.join(names[:10])}"
                raise DataError(f"there is no dataset '{one}'", where=f"stages.{stage}.curate.{key}", remedy=remedy)


def _check_kept(summary: dict[str, Any], stage: str, meta: str) -> None:
    if not summary["kept"]:
        told = _told(summary["rejected"], summary["reasons"])
        raise DataError(f"no sample is left: {told}", where=f"stages.{stage}: {meta}",
                        remedy=f"look at review.html of {ITS_FOLDER}, and loosen stages.{stage}.curate")  # fmt: skip
