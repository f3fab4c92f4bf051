"""Copies within a mixture and of evaluation sets: planted ones are found, different samples are left alone."""

import io
import random
import re
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_digits

from stages.curation import Contamination, Duplicates
from stages.prepare.duplicates import find_contaminated, find_duplicates
from stages.prepare.signatures import FRAMES, PICTURE, SHORT, Signatures, normalized, signature, sketch

DIGITS = (load_digits().images * 15.9375).astype(np.uint8)  # pyright: ignore[reportAttributeAccessIssue]
NEAR = Duplicates()
HELD = Contamination(against=("test",))
WORDS = re.findall(r"\w+", "the a river stone light green tall house wooden street near water picture shows two people")
STORY = " ".join(random.Random(0).choices(WORDS, k=120))
CHINESE = "".join(
    random.Random(0).choices("我们在河边看到许多高大的树木和古老的石桥，孩子正在草地上玩耍。天空很蓝", k=300)
)


def picture(seed: int) -> Image.Image:
    """A row of five digits on grey paper."""
    rng = random.Random(seed)
    out = Image.new("L", (300, 90), 200)
    for place in range(5):
        digit = Image.fromarray(DIGITS[rng.randrange(len(DIGITS))])
        out.paste(digit.resize((50, 50), Image.Resampling.BICUBIC), (10 + 57 * place, 20))
    return out


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sample(question: str = "What is shown?", answer: str = "Digits.", *pictures: Image.Image) -> Signatures:
    turns = [{"from": "human", "value": "<image>\n" * len(pictures) + question}, {"from": "gpt", "value": answer}]
    return signature(turns, pictures, [png(one) for one in pictures])


def found(*samples: Signatures, params: Duplicates = NEAR) -> list[int]:
    return find_duplicates(Signatures.concat(samples), params).tolist()


def again(quality: int, kind: str = "JPEG") -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.open(io.BytesIO(png(image, kind, quality=quality)))


def scaled(x: float, y: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((round(image.width * x), round(image.height * y)), Image.Resampling.BICUBIC)


EDITS = {
    "half": scaled(0.5, 0.5),
    "double": scaled(2, 2),
    "wider": scaled(1.03, 1),
    "jpeg 50": again(50),
    "jpeg 95": again(95),
    "webp": again(60, "WEBP"),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.93),
    "rgb": lambda image: image.convert("RGB"),
    "half, jpeg": lambda image: again(50)(scaled(0.5, 0.5)(image)),
}


# -- within a mixture ---------------------------------------------------------------------------------------------


def test_nothing():
    empty = Signatures.concat([])
    assert len(find_duplicates(empty, NEAR)) == len(find_contaminated(empty, sample(), HELD)) == 0
    assert find_contaminated(sample(), empty, HELD).tolist() == [-1]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_picture_is_a_copy_of_its_own_original(edit):
    originals = [sample("What is shown?", "Digits.", picture(seed)) for seed in range(20)]
    copies = [sample("What is shown?", "Digits.", EDITS[edit](picture(seed))) for seed in range(20)]
    assert found(*originals, *copies) == [-1] * 20 + list(range(20))


def test_different_pictures_with_the_same_text_are_no_copies():
    digits = [Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC) for pixels in DIGITS[:400]]
    assert set(found(*(sample("What is shown?", "A digit.", digit) for digit in digits))) == {-1}


@pytest.mark.parametrize("text", [STORY, CHINESE], ids=["English", "Chinese"])
@pytest.mark.parametrize(
    "edit",
    [
        str.upper,
        lambda text: text.replace(" ", " \n") + "。",
        lambda text: "“" + text.replace("，", ",").replace("。", " ") + "”!",
        lambda text: text[:150] + "银行" + text[152:],
    ],
    ids=["case", "spacing", "punctuation", "a word"],
)
def test_an_edited_text_is_a_copy(text, edit):
    assert found(sample(text, text), sample(text, edit(text)), sample(edit(text), text)) == [-1, 0, 0]


def test_a_paraphrase_or_half_a_text_is_no_copy():
    other = " ".join(random.Random(1).choices(WORDS, k=120))
    assert found(sample("Tell.", STORY), sample("Tell.", other), sample("Tell.", STORY[:300] + other[300:])) == [-1] * 3


def test_question_and_picture_both_count():
    same = sample("Which digits?", "1 2 3 4 5", picture(0))
    assert found(
        same,
        sample("How many digits?", "1 2 3 4 5", picture(0)),
        sample("Which digits?", "1 2 3 4 5", picture(1)),
        sample("Which digits?", "1 2 3 4 6", picture(0)),
        sample("Which digits?", "1 2 3 4 5"),
        sample("which DIGITS", "1 2 3 4 5.", picture(0)),
    ) == [-1, -1, -1, -1, -1, 0]


def test_numbers_and_signs_must_agree_in_the_longest_text():
    for one, other in (("12.5 cm", "12.6 cm"), ("3 + 4", "3 * 4"), ("1 2", "12"), ("x = -5", "x = 5")):
        assert found(sample("Read.", f"{STORY} {one}"), sample("Read.", f"{STORY} {other}")) == [-1, -1]


def test_a_template_with_a_short_answer_differs_in_its_slot():
    questions = [f"{STORY} Classify: {word}" for word in ("good", "bad", "Good!")]
    assert found(*(sample(question, "positive") for question in questions)) == [-1, -1, 0]


def test_pictures_are_compared_one_by_one():
    one, two, three = picture(1), picture(2), picture(3)
    assert found(
        sample("Compare.", "Same.", one, two),
        sample("Compare.", "Same.", two, one),
        sample("Compare.", "Same.", one, three),
        sample("Compare.", "Same.", one),
        sample("Compare.", "Same.", one, two, three),
        sample("Compare.", "Same.", again(60)(one), again(60)(two)),
    ) == [-1, -1, -1, -1, -1, 0]


def test_a_video_has_few_pictures_of_all_its_frames():
    frames = [picture(seed) for seed in range(40)]
    video = sample("What?", "Rows.", *frames)
    assert len(video.pictures) == FRAMES and video.samples["media"] == 40
    turned = sample("What?", "Rows.", *frames[::-1])
    assert found(video, turned, sample("What?", "Rows.", *map(again(60), frames))) == [-1, -1, 0]


def test_flat_and_nearly_empty_pictures_match_only_their_like():
    plain = [Image.new("RGB", (200, 200), colour) for colour in ("white", "black", "red", "lime")]
    dots = [Image.new("RGB", (800, 800), "white") for _ in range(6)]
    for place, dot in enumerate(dots):
        ImageDraw.Draw(dot).rectangle((100 * place + 50, 300, 100 * place + 52, 302), fill="black")
    different = [sample("Colour?", "Yes.", image) for image in plain + dots]
    assert set(found(*different)) == {-1}
    assert found(*different, sample("Colour?", "Yes.", plain[2].resize((100, 100))))[-1] == 2


def test_the_same_shapes_in_another_colour_differ():
    squares = []
    for colour in ("red", "blue"):
        image = Image.new("RGB", (200, 200), "white")
        ImageDraw.Draw(image).rectangle((50, 50, 120, 120), fill=colour)
        squares.append(sample("Colour?", "Yes.", image))
    assert found(*squares) == [-1, -1]


def test_a_chain_of_copies_leads_to_one_that_is_kept_and_near():
    texts = [STORY]
    for step in range(12):  # each is near the one before, the last is far from the first
        start = 40 * step + 10
        texts.append(texts[-1][:start] + "x" * 12 + texts[-1][start + 12 :])
    samples = [sample("Tell.", text) for text in texts]
    of = found(*samples)
    assert of[0] == -1 and of[1] == 0 and of[-1] != 0
    for place, kept in enumerate(of):
        assert kept == -1 or (of[kept] == -1 and found(samples[kept], samples[place]) == [-1, 0])


def test_one_text_with_twenty_thousand_pictures_is_fast():
    n, rng = 20_000, np.random.default_rng(0)
    one = sample("What is shown?", "A digit.", picture(0))
    samples, pictures = np.repeat(one.samples, n), np.repeat(one.pictures, n)
    samples["digest"] = rng.integers(0, 256, samples["digest"].shape)
    pictures["code"] = rng.integers(-127, 128, pictures["code"].shape)
    copies = rng.permutation(n)[:200].reshape(2, -1)
    copies.sort(axis=0)
    noise = rng.integers(-8, 9, (copies.shape[1], *PICTURE["code"].shape))
    pictures["code"][copies[1]] = (pictures["code"][copies[0]] + noise).clip(-127, 127)
    began = time.process_time()
    of = find_duplicates(Signatures(samples, pictures), NEAR)
    assert time.process_time() - began < 20  # every pair would take minutes
    assert (of[copies[1]] == copies[0]).mean() >= 0.98 and (of >= 0).sum() <= copies.shape[1]


def test_one_text_twenty_thousand_times_is_kept_once():
    one = sample("Hello!", "Good day.")
    samples = np.repeat(one.samples, 20_000)
    samples["digest"] = np.random.default_rng(0).integers(0, 256, samples["digest"].shape)
    assert find_duplicates(Signatures(samples, one.pictures), NEAR).tolist() == [-1] + [0] * 19_999


POOL = [
    *(sample("Which?", "This.", picture(seed)) for seed in range(3)),
    sample("Which?", "This.", again(60)(picture(0))),
    sample("Which one?", "This.", picture(0)),
    *(sample("Tell.", text) for text in (STORY, STORY.upper(), CHINESE, "7", "8", "７.")),
]
CLASSES = [0, 1, 2, 0, 3, 4, 4, 5, 6, 7, 6]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(POOL) - 1), max_size=12))
def test_any_order_gives_the_same_classes_and_keeps_the_first(order):
    first: dict[int, int] = {}
    expected = []
    for place, which in enumerate(order):
        kept = first.setdefault(CLASSES[which], place)
        expected.append(-1 if kept == place else kept)
    assert found(*(POOL[which] for which in order)) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=SHORT - 1), max_size=8))
def test_short_texts_are_copies_exactly_where_they_read_the_same(texts):
    of = found(*(sample("Say.", text) for text in texts))
    for place, text in enumerate(texts):
        if texts.index(text) < place:
            assert of[place] >= 0
        if of[place] >= 0:
            assert normalized(texts[of[place]]) == normalized(text)


def test_a_letter_makes_another_short_text():
    text = "Which of the two boats is on the left of the old stone bridge"
    changed = {text[:at] + "x" + text[at + 1 :] for at in range(len(text)) if text[at] != " "}
    assert set(found(*(sample("Say.", one) for one in [text, *sorted(changed)]))) == {-1}


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=100, max_size=400), st.integers(0, 99))
def test_the_sketch_estimates_the_similarity_of_shingles(text, at):
    other = text[:at] + "€€€" + text[at + 3 :]
    left, right = ({f"\0\0\0\0{t}\0\0\0\0"[i : i + 5] for i in range(len(t) + 4)} for t in (text, other))
    similarity = len(left & right) / len(left | right)
    assert abs((sketch(text) == sketch(other)).mean() - similarity) < 0.225  # five standard errors


# -- against an evaluation set ------------------------------------------------------------------------------------


def test_contamination_by_picture_and_question():
    held = Signatures.concat([sample("How many digits are there?", "5", picture(seed)) for seed in range(5)])
    training = Signatures.concat(
        [
            sample("How many digits are there?", "Five of them.", again(60)(scaled(0.5, 0.5)(picture(3)))),
            sample("how many digits are there", "5", picture(9), picture(2)),
            sample("Is it dark?", "No.", picture(1)),
            sample("How many digits are there?", "5", picture(9)),
            sample("How many digits are there?", "5"),
        ]
    )
    expected = {"both": [3, 2, -1, -1, -1], "image": [3, 2, 1, -1, -1], "text": [0, 0, -1, 0, 0]}
    for match, indices in expected.items():
        params = Contamination(against=("test",), match=match)  # pyright: ignore[reportArgumentType]
        assert find_contaminated(training, held, params).tolist() == indices, match


@pytest.mark.parametrize("match", ["both", "image", "text"])
@pytest.mark.parametrize("text", [STORY, CHINESE], ids=["English", "Chinese"])
def test_contamination_of_text_alone(match, text):
    held = Signatures.concat([sample("Something else?", "No."), sample(text, "Yes.")])
    edited = text[:150].upper() + "银行" + text[152:] + "?"
    training = Signatures.concat([sample(edited, "Perhaps."), sample("Tell.", text), sample(text[:200], "Yes.")])
    params = Contamination(against=("test",), match=match)
    assert find_contaminated(training, held, params).tolist() == [1, -1, -1]


def test_a_question_of_many_evaluation_pictures_is_compared_with_the_right_one():
    held = Signatures.concat([sample("What is shown?", "?", picture(seed)) for seed in range(300)])
    training = Signatures.concat([sample("What is shown?", "!", again(60)(picture(seed))) for seed in range(290, 310)])
    expected = [*range(290, 300)] + [-1] * 10
    for match in ("both", "image"):
        assert find_contaminated(training, held, Contamination(against=("test",), match=match)).tolist() == expected


def test_signatures_come_back_from_a_file(tmp_path):
    signatures = Signatures.concat(POOL)
    signatures.save(tmp_path / "signatures.npz")
    loaded = Signatures.load(tmp_path / "signatures.npz")
    assert (loaded.samples == signatures.samples).all() and (loaded.pictures == signatures.pictures).all()


def test_signatures_of_texts_are_the_same_everywhere():
    """Another machine or release must not give other ones: which samples are kept would depend on it."""
    assert sketch("7")[:4].tolist() == [38, 2, 180, 117]
    assert sketch("桥" * 70 + "a river")[:4].tolist() == [200, 68, 26, 109]
