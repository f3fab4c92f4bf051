"""The fenced blocks of the pages, and how each is tried: what is written about a command is run, or at least parsed.

Invariant: every block of commands has a mark, an HTML comment on the line before it, which readers do not see:

    <!-- run -->            as it is, in seconds and without Ray (tests/unit/test_docs.py)
    <!-- run: ray -->       as it is, with Ray (tests/cluster/test_docs.py); "ray, short": where the long one is not run
    <!-- needs: WHAT -->    not run here: it needs a cloud, a cluster, time ...; its stageline commands are parsed
    <!-- usage -->          a synopsis; its verbs and options exist
    <!-- file: PATH -->     no command: written to PATH before a page's commands are run
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMMANDS = ("", "bash", "console", "sh")  # what a fence says of a block that is typed into a shell
KINDS = ("run", "needs", "usage", "file")
_FENCE = re.compile(r"^```([\w{}-]*)\s*$")
_MARK = re.compile(r"^<!-- (\w+)(?:: (.+?))? -->$")


@dataclass(frozen=True)
class Block:
    """line: of its first line in the page. mark: one of KINDS or ""; value: what stands behind it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    value: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> bool:
        return self.language in COMMANDS


def pages() -> list[Path]:
    return [README, *sorted(path for path in (ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Of a page, in order. Raises ValueError for a fence that does not end."""
    lines, out, at = page.read_text().splitlines(), [], 0
    while at < len(lines):
        if (fence := _FENCE.match(lines[at])) is None:
            at += 1
            continue
        end = next((i for i in range(at + 1, len(lines)) if lines[i] == "```"), None)
        if end is None:
            raise ValueError(f"{page}:{at + 1}: the block does not end")
        mark = _MARK.match(lines[at - 1]) if at else None
        kind, value = (mark[1], mark[2] or "") if mark else ("", "")
        text = "".join(f"{line}\n" for line in lines[at + 1 : end])
        out.append(Block(page, at + 2, fence[1], text, kind, value))
        at = end + 1
    return out


def write_files(folder: Path, of: Sequence[Path]) -> None:
    """The files that pages show, below `folder`."""
    for block in (block for page in of for block in blocks(page) if block.mark == "file"):
        target = folder / block.value
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(block.text)


def script(found: Sequence[Block]) -> str:
    """One bash script of all blocks: the first command that fails ends it, named by its place. What one block sets,
    the next ones have, as in the reader's shell."""
    parts = ["set -eo pipefail\n", "trap 'echo \"failed: $PLACE\" >&2' ERR\n"]
    for block in found:
        parts.append(f'PLACE={shlex.quote(block.place)}; echo "### $PLACE"\n{block.text}')
    return "".join(parts)


def stageline_commands(text: str) -> Iterator[str]:
    """What stands behind `stageline` in each such command of a block."""
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        for found in re.finditer(r"(?:^|\$\(|[;&|]\s*|\.venv/bin/)stageline ([^#|;)&\n]*)", line):
            yield found[1]


def files_named(text: str) -> list[str]:
    """Files below the reader's folder that commands name."""
    return re.findall(r"(?<![\w/:.-])(?:\w[\w.-]*/)+[\w.-]+\.(?:ya?ml|json|py|txt)\b", text)
