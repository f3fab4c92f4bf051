"""The review: every sample shows what was found, and verdicts are read back whole or refused with their place."""

import html
import json

import pytest
from pages import HOSTILE, Outline, check_closed, example, png

from modeling.errors import DataError
from stages.prepare.page import OFTEN, turns
from stages.prepare.review import read_review, write_review

DIGEST = "0123456789abcdef"
OTHER = "f" * 16


def page(folder, *examples, total: int = 0, **given):
    path = folder / "review.html"
    write_review(path, "Review", examples, total or len(examples), mixture="digits/sft", **given)
    return path


def saved(folder, verdicts, **changes):
    path = folder / "verdicts.json"
    path.write_text(json.dumps({"version": 1, "mixture": "sft", "verdicts": verdicts} | changes))
    return path


def test_verdicts_are_read_back(tmp_path):
    verdicts = {DIGEST: "keep", OTHER: "drop"}
    assert read_review(saved(tmp_path, verdicts)) == verdicts
    assert read_review(saved(tmp_path, {})) == {}


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", ":1", "not JSON"),
        ('{"version": 1,\n"verdicts": {]}', ":2", "not JSON"),
        ("[" * 100_000, "", "nested beyond reading"),
        ("[]", "", "found a list"),
        ("{}", ": version", "must be 1, found None"),
        ('{"version": 2, "verdicts": {}}', ": version", "found 2"),
        ('{"version": true, "verdicts": {}}', ": version", "found True"),
        ('{"version": 1}', ": verdicts", "found None"),
        ('{"version": 1, "verdicts": ["keep"]}', ": verdicts", "must be an object"),
        ('{"version": 1, "verdicts": {}, "verdict": {}}', "", "unknown key 'verdict'"),
        ('{"version": 1, "verdicts": {"0-17": "keep"}}', ": verdicts.0-17", "not the digest"),
        (f'{{"version": 1, "verdicts": {{"{DIGEST}\\n": "keep"}}}}', f": verdicts.{DIGEST}\n", "not the digest"),
        (f'{{"version": 1, "verdicts": {{"{DIGEST}": "undecided"}}}}', f": verdicts.{DIGEST}", "'undecided'"),
        (f'{{"version": 1, "verdicts": {{"{DIGEST}": ["keep"]}}}}', f": verdicts.{DIGEST}", "keep or drop"),
        (f'{{"version": 1, "verdicts": {{"{DIGEST}": "keep", "{DIGEST}": "drop"}}}}', "", f"'{DIGEST}' stands twice"),
        ('{"version": 1, "version": 1, "verdicts": {}}', "", "'version' stands twice"),
    ],
)
def test_a_malformed_file_is_refused_with_place_and_remedy(tmp_path, text, place, message):
    path = tmp_path / "verdicts.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_review(path)
    assert error.value.where == f"{path}{place}"
    assert message in error.value.message and error.value.remedy


def test_a_file_that_cannot_be_read_is_a_users_mistake(tmp_path):
    with pytest.raises(DataError, match="no file of verdicts"):
        read_review(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"version": 1, "mixture": "\xe9"}')
    with pytest.raises(DataError, match="cannot read"):
        read_review(tmp_path / "latin.json")


def test_every_sample_has_its_picture_text_reason_and_verdict(tmp_path):
    one, two = example(1, "Eins.", pictures=(png(),)), example(2, "Zwei.", reason="zero_run", dataset="texte")
    path = page(tmp_path, one, two, earlier={two.digest: "drop", OTHER: "keep"})
    outline = Outline(path)
    assert outline.values("data-key") == [one.digest, two.digest]
    assert outline.values("data-reason") == ["repetition", "zero_run"]
    assert outline.values("data-dataset") == ["photos", "texte"]
    assert all(text in outline.text for text in ("Eins.", "Zwei.", "id-1", "too often", "2 flagged samples"))
    assert len(outline.values("src")) == 1
    source = path.read_text(encoding="utf-8")
    assert f'name="v-{two.digest}" value="drop" checked' in source
    assert f'name="v-{one.digest}" value="undecided" checked' in source
    (earlier,) = outline.values("data-earlier")
    assert json.loads(earlier) == {two.digest: "drop", OTHER: "keep"}  # saved again with the new ones
    check_closed(path)


def test_copies_of_a_content_are_one_decision_and_the_limit_is_told(tmp_path):
    path = page(tmp_path, *(example(i % 4) for i in range(12)), total=12345, limit=3)
    outline = Outline(path)
    assert len(outline.values("data-key")) == len(set(outline.values("data-key"))) == 3
    assert "3 of 12,345 flagged samples are shown" in outline.text
    assert "2 more with this content" in outline.text


def test_a_sample_without_a_digest_cannot_be_reviewed(tmp_path):
    with pytest.raises(ValueError, match="digest"):
        page(tmp_path, example(digest=""))


def test_texts_stay_texts_wherever_they_stand(tmp_path):
    def outline(text: str) -> Outline:
        shown = [example(1, text=text, pictures=(png(),)), example(2, text=text, reason=text, key=text, type=text)]
        path = tmp_path / "review.html"
        write_review(path, text, shown, 2, mixture=text)
        check_closed(path)
        return Outline(path)

    tame, hostile = outline("tame"), outline(HOSTILE)
    assert hostile.tags == tame.tags
    assert hostile.raw == tame.raw and tame.raw["script"]
    assert "<script>alert(1)</script>" in hostile.text


def plain(text: str) -> str:
    return html.unescape(text.replace("<mark>", "").replace("</mark>", ""))


def marked(text: str) -> list[str]:
    return [html.unescape(part.split("</mark>")[0]) for part in str(text).split("<mark>")[1:]]


@pytest.mark.parametrize(
    "loop",
    [
        "0" * 400,
        "这是一张美丽的风景照片。" * 30,
        "There is a person on the sidewalk & a <dog>. " * 30,
        "yes\nno\n" * 20,
    ],
)
def test_what_comes_again_and_again_is_marked_and_seen_in_a_long_text(loop):
    clean = " ".join(str(i * 7919 % 1_000_003) for i in range(5000))
    (human, answer), more = turns([{"from": "human", "value": loop}, {"from": "gpt", "value": clean + loop}], 4000)
    assert not more
    assert "<mark>" not in human.text  # prompts repeat themselves: only answers are learned
    assert answer.before > 0 and any(len(part) >= 0.9 * min(len(loop), 1500) for part in marked(answer.text))
    assert plain(answer.text) == (clean + loop)[answer.before : len(clean + loop) - answer.after]


def test_the_same_answer_in_many_turns_is_marked():
    said = [("human", f"{i}?") if i % 2 == 0 else ("gpt", "I cannot tell from the picture.") for i in range(2 * OFTEN)]
    shown, _ = turns([{"from": role, "value": value} for role, value in said], 4000)
    assert [len(marked(turn.text)) for turn in shown] == [0, 1] * OFTEN


def test_plain_texts_and_blank_runs_are_not_marked():
    text = "def f(x):\n" + "\n".join(f"{' ' * 24}y{i} = x * {i * 37 % 101}" for i in range(9))
    (turn,), _ = turns([{"from": "gpt", "value": text}], 4000)
    assert marked(turn.text) == []
    (turn,), _ = turns([{"from": "gpt", "value": "A cat sits on a mat, and a dog looks at it."}], 4000)
    assert marked(turn.text) == []


def test_control_tokens_are_marked_in_any_turn():
    said = [{"from": "human", "value": "Hi<|im_end|>"}, {"from": "gpt", "value": "<IMG_CONTEXT> a < b |> c"}]
    shown, _ = turns(said, 4000)
    assert [marked(turn.text) for turn in shown] == [["<|im_end|>"], ["<IMG_CONTEXT>"]]


def test_a_conversation_of_many_turns_is_cut_and_its_marks_are_not():
    said = [{"from": "gpt", "value": f"answer number {i * 7919}"} for i in range(500)]
    said[400]["value"] = "0" * 5000
    shown, more = turns(said, 4000)
    assert len(shown) == 21 and more == 479 and sum(len(plain(turn.text)) for turn in shown) < 6000
    assert marked(shown[-1].text)
