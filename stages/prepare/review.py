"""The review list: a page of flagged samples that a person decides on, and the file of verdicts that it saves.

Invariant: a verdict belongs to a sample's content (`digest`), not to its place, so it holds when lines are added, moved
or removed, and falls away when the sample itself is edited: then it has to be looked at again. One verdict speaks for
all copies of a content. The file is read in full or refused, with place and remedy. Flagged samples are reviewed by
hand as in arXiv 2412.05271, §4.3.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from modeling.errors import DataError
from modeling.meta import no_duplicates
from stages.prepare import shares
from stages.prepare.page import Example, shown, write_page

Verdict = Literal["keep", "drop"]

VERSION = 1
SHOWN = 300  # samples on a page: about 6 MB with a photo each
CHARACTERS = 30_000  # of a sample
DIGEST = re.compile(r"[0-9a-f]{16}")
REMEDY = "save the verdicts again from the review page"


def write_review(
    path: Path,
    title: str,
    examples: Iterable[Example],
    total: int,
    *,
    mixture: str,
    earlier: Mapping[str, Verdict] | None = None,
    limit: int = SHOWN,
) -> int:
    """Writes the page with the first `limit` contents of `examples`; returns how many it shows.

    total: flagged samples in all, told on the page. mixture: a name that stays the same when the mixture is prepared
    again (experiment and mixture, not a fingerprint): the browser keeps decisions under it. earlier: verdicts that were
    read back for this run: shown, and saved again with the new ones.
    """
    earlier = dict(earlier or {})
    samples: dict[str, dict[str, Any]] = {}
    for example in examples:
        if not DIGEST.fullmatch(example.digest):
            raise ValueError(f"a sample is reviewed by its digest, found {example.digest!r} ({example.key})")
        if example.digest in samples:
            samples[example.digest]["copies"] += 1
        elif len(samples) < limit:
            given = earlier.get(example.digest, "undecided")
            samples[example.digest] = shown(example, characters=CHARACTERS) | {"copies": 0, "verdict_given": given}
    listed = list(samples.values())
    write_page(
        path,
        "review",
        title=title,
        samples=listed,
        total=total,
        mixture=mixture,
        earlier=json.dumps(earlier, sort_keys=True),
        reasons=sorted({sample["reason"] for sample in listed}),
        datasets=list(dict.fromkeys(sample["dataset"] for sample in listed)),
        type_name=shares.name,
    )
    return len(listed)


def read_review(path: Path | str) -> dict[str, Verdict]:
    """Verdicts by digest, as the page saves them: {"version": 1, "mixture": name, "verdicts": {digest: keep | drop}}.

    Raises DataError: no such file, not JSON, a digest twice, an unknown key, version, digest or verdict.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError("no file of verdicts", where=str(path), remedy="check `review:` under `curate:`") from None
    except (ValueError, OSError) as error:  # not UTF-8, a name that is too long or holds NUL, no permission
        raise DataError(f"cannot read the verdicts: {error}", where=str(path), remedy=REMEDY) from None
    try:
        data = json.loads(text, object_pairs_hook=lambda pairs: no_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}", remedy=REMEDY) from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        what = "nested beyond reading" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"not a file of verdicts: {what}", where=str(path), remedy=REMEDY) from None
    if not isinstance(data, dict):
        raise DataError(f"must be an object, found a {type(data).__name__}", where=str(path), remedy=REMEDY)
    if type(version := data.get("version")) is not int or version != VERSION:
        raise DataError(f"version must be {VERSION}, found {version!r}", where=f"{path}: version", remedy=REMEDY)
    for name in data:
        if name not in ("version", "mixture", "verdicts"):
            remedy = "known keys: version, mixture, verdicts"
            raise DataError(f"unknown key {name!r}", where=str(path), remedy=remedy)
    verdicts = data.get("verdicts")
    if not isinstance(verdicts, dict):
        raise DataError(f"must be an object, found {verdicts!r}", where=f"{path}: verdicts", remedy=REMEDY)
    for digest, verdict in verdicts.items():
        where = f"{path}: verdicts.{digest}"
        if not DIGEST.fullmatch(digest):
            remedy = "name a sample by its digest, 16 hex digits, as in verdicts.parquet"
            raise DataError("not the digest of a sample", where=where, remedy=remedy)
        if verdict not in get_args(Verdict):
            remedy = "write keep or drop, or remove the line to leave it undecided"
            raise DataError(f"must be keep or drop, found {verdict!r}", where=where, remedy=remedy)
    return verdicts
