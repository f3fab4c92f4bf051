"""What tests of HTML pages share: samples to show, texts that try to leave their place, and a page's outline."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from stages.prepare.page import Example

HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(1)">"\'><svg onload=alert(1)></script></style></title>'
    "</textarea>--><!--<b>&lt;&#60; javascript:alert(1) {{ 7 * 7 }}{% raw %}\u202egnp.exe\u2066\x00\x1b[31m\r\x85\u200b"
    "\ufeff https://example.com/x.js ]]><iframe src=//example.com>\ud800中文"
)


def png(width: int = 8, height: int = 8, color: str = "teal") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, "PNG")
    return out.getvalue()


def example(number: int = 1, *answers: str, pictures: tuple[bytes, ...] = (), text: str = "", **changes) -> Example:
    """A rejected sample; with `text`, everywhere where its source has a say."""
    said = [turn for answer in answers or ("A cat.",) for turn in (("human", "What?"), ("gpt", answer))]
    fields = {
        "dataset": text or "photos",
        "id": text or f"id-{number}",
        "key": f"0-{number}",
        "digest": hashlib.sha256(str(number).encode()).hexdigest()[:16],
        "type": "image",
        "verdict": "rejected",
        "step": "text",
        "reason": "repetition",
        "detail": text or "too often",
        "conversation": [{"from": role, "value": text or value} for role, value in said],
        "pictures": pictures,
    }
    return Example(**fields | changes)


class Outline(HTMLParser):
    """tags: (name, attribute names) in order. style, script: their texts. text: all other, without markup."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.raw = {"style": "", "script": ""}
        self.text = ""
        self.comments = 0
        self._inside = ""
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag if tag in self.raw else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside:
            self.raw[self._inside] += data
        else:
            self.text += data

    def handle_comment(self, data):
        self.comments += 1

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def check_closed(page: Path) -> None:
    """Nothing is loaded, nothing runs but our own script and style, no character acts on the page."""
    outline = Outline(page)
    names = {name for name, _ in outline.tags}
    assert not names & {"a", "base", "embed", "iframe", "link", "object", "video"} and not outline.comments
    assert all(value.startswith("data:image/jpeg;base64,") for value in outline.values("src"))
    loading = {"href", "srcset", "style", "action", "formaction", "poster", "background", "srcdoc"}
    assert not [name for _, name, _ in outline.attributes if name in loading or name.startswith("on")]
    assert not re.search(r"url\(|@import", outline.raw["style"])
    (policy,) = [v for _, name, v in outline.attributes if name == "content" and "default-src" in v]
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(outline.raw[kind].encode()).digest()).decode()
        found = f"'sha256-{digest}'" if outline.raw[kind] else "'none'"
        assert re.search(rf"{kind}-src {re.escape(found)}", policy), "the browser would refuse it"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", page.read_text("utf-8"))
