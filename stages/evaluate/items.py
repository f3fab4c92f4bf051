"""A question of an evaluation set, whatever file it came from: what readers give, and generation and scoring take.

Invariant: an item is whole: its question holds one `<image>` for each picture, in order, and its references are what
its metric (match.py) compares with. Media are bytes, or the path or s3:// address of a file that the worker opens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stages.evaluation import AnswerKind

Media = bytes | str


@dataclass(frozen=True)
class Item:
    """One question.

    id: unique within its set. task: its row in the tables. question: the human turn as it is asked, options included,
    without the words that ask for a form of answer (prompts.py adds them). kind: how its answer is read (extract.py).
    metric: a key of match.METRICS. options: letter -> text. box: [x1, y1, x2, y2] of 0 … 1000, as references in text.
    category: a group within the task, e.g. the subject of MMMU. video: its images are the frames of one, drawn when
    asked. max_tiles: for all its pictures together. history: turns before the question, {from, value}.
    """

    id: str
    task: str
    question: str
    kind: AnswerKind
    metric: str
    references: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    multiple: bool = False
    category: str = ""
    images: tuple[Media, ...] = ()
    video: Media | None = None
    max_tiles: int = 12
    language: Literal["en", "zh"] = "en"
    history: tuple[dict[str, str], ...] = ()
