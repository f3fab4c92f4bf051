"""`curate:` of a prepare stage: which steps look at samples that are whole, and their limits (arXiv 2412.05271, §4.3).

A step that is not named does not run. Each rejects with reasons of its own (modeling/sources.py); the sets that
`exempt` names pass a step unseen. Nothing but pydantic is imported here, so that planning stays fast.
"""

from pydantic import Field

from stages.base import Params


class ImageChecks(Params):
    """Pictures too small or too long to show anything."""

    min_side: int = Field(default=16, ge=1, description="pixels of the shorter side")
    max_ratio: float = Field(default=50.0, ge=1, description="longer side by shorter side")


class TextChecks(Params):
    """Heuristics on answers: abnormal length, zero runs, duplicate lines, repetition, odd characters."""


class Duplicates(Params):
    """Exact and near copies within the mixture: the first one in its order is kept."""


class Contamination(Params):
    """Samples that stand in an evaluation set."""

    against: tuple[str, ...] = Field(min_length=1, description="names of mixtures under `data:`")


class Scores(Params):
    """Domain, quality and repetition scores by a language model."""


class Exempt(Params):
    """Names of datasets that pass a step unseen."""

    images: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    contamination: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()


class Curation(Params):
    images: ImageChecks | None = None
    text: TextChecks | None = None
    duplicates: Duplicates | None = None
    contamination: Contamination | None = None
    scores: Scores | None = None
    exempt: Exempt = Exempt()
    review: str | None = Field(default=None, description="verdicts of a review (JSON), as the review page saves them")
