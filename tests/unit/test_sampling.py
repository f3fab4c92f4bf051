"""Samples: greedy equals `answer`, a sample is its own whatever shares its batch, draws follow the distribution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from modeling import sampling
from modeling.generate import Question, answer, encode_question
from modeling.sampling import pick, sample, uniforms

torch.set_num_threads(1)


def ask(text, *images, max_tiles=6, video=False):
    return Question([{"from": "human", "value": text}], images, max_tiles, video=video)


def picture(width=32, height=32, level=100):
    shades = [(v + level) % 256 for v in range(256)]
    return Image.linear_gradient("L").resize((width, height)).point(shades).convert("RGB")


QUESTIONS = [
    ask("<image>\nRead it.", picture(96, 32)),
    ask("two plus two"),
    ask("<image>\n<image>\nWhich digit of the two is the larger one?", picture(), picture(level=7)),
    ask("<video>\nWhat moves?", picture(), picture(level=50), picture(level=90), video=True),
]
KEYS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tiny(micro):
    """A random model sharp enough that its answers differ, and whose answers end now and then."""
    model = micro.build(seed=1)
    with torch.no_grad():
        model.lm_head.weight *= 8
        model.lm_head.weight[micro.tokenizer.eos_token_id] *= 3
    return model


def close(one, other):
    """Two generations are one, up to the rounding of floats."""
    return (one.text, one.tokens, one.cut) == (other.text, other.tokens, other.cut) and np.allclose(
        [one.logprob, one.certainty], [other.logprob, other.certainty], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [0, 1, 2, 3]])
def test_greedy_equals_answer(micro, tiny, chosen):
    questions = [QUESTIONS[i] for i in chosen]
    expected = answer(tiny, micro.tokenizer, questions, system="", max_new_tokens=12)
    rows = sample(tiny, micro.tokenizer, questions, KEYS[: len(chosen)], system="", max_new_tokens=12)
    assert [row[0].text for row in rows] == expected
    assert [len(row) for row in rows] == [1] * len(chosen)


def test_greedy_samples_are_one(micro, tiny):
    (row,) = sample(tiny, micro.tokenizer, QUESTIONS[:1], "a", system=None, max_new_tokens=4, samples=(0, 5, 2))
    assert len(row) == 3 and len(set(row)) == 1


def test_a_sample_is_the_same_in_any_company(micro, tiny):
    """Other questions, other sample numbers, other lengths of padding: the same texts."""
    settings = {"system": "", "max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95, "seed": 3}
    pool = sample(tiny, micro.tokenizer, QUESTIONS, KEYS, samples=range(6), **settings)
    assert len({g.text for row in pool for g in row}) > 12, "random samples differ"
    ends = [g.tokens for row in pool for g in row if not g.cut]
    assert len(set(ends)) > 2 and len(ends) < 24, "some end at different places, some are cut"
    for i, question in enumerate(QUESTIONS):
        for numbers in ((4,), (5, 1)):
            (alone,) = sample(tiny, micro.tokenizer, [question], KEYS[i : i + 1], samples=numbers, **settings)
            assert all(close(g, pool[i][j]) for g, j in zip(alone, numbers, strict=True))
    swapped = sample(tiny, micro.tokenizer, QUESTIONS[::-1], KEYS[::-1], samples=(2, 0), **settings)
    assert all(close(row[1], pool[3 - i][0]) for i, row in enumerate(swapped))


def test_key_and_seed_are_part_of_a_draw(micro, tiny):
    def texts(key, seed):
        (row,) = sample(
            tiny, micro.tokenizer, QUESTIONS[1:2], [key], system="", max_new_tokens=16, temperature=1.0,
            samples=range(3), seed=seed,
        )  # fmt: skip
        return [g.text for g in row]

    assert texts("a", 0) == texts("a", 0)
    assert texts("a", 0) != texts("b", 0) and texts("a", 0) != texts("a", 1)


def test_logprob_and_certainty_are_those_of_the_model(micro, tiny, monkeypatch):
    """Against one forward over prompt and answer, at temperature 1 whatever the sampling was."""
    rows, texts = [], sampling.texts_of  # a random model's text is not tokenised back as it was written
    monkeypatch.setattr(sampling, "texts_of", lambda tokenizer, ids: rows.extend(ids) or texts(tokenizer, ids))
    found = sample(
        tiny, micro.tokenizer, QUESTIONS[:3], KEYS[:3], system="", max_new_tokens=9, temperature=0.8, top_p=0.9,
        samples=(0, 1),
    )  # fmt: skip
    for question, pair in zip(QUESTIONS, found, strict=False):
        prompt, pixels = encode_question(question, micro.tokenizer, tiny.config, "")
        images = {} if pixels is None else {"pixel_values": pixels}
        for g in pair:
            tokens = rows.pop(0)
            with torch.no_grad():
                logits = tiny(input_ids=torch.tensor([prompt + tokens]), **images).logits[0]
            logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
            assert g.tokens == len(tokens)
            assert g.logprob == pytest.approx(logp[range(len(tokens)), tokens].sum().item(), rel=1e-3, abs=1e-3)
            kl = torch.nn.functional.kl_div(logp, torch.full_like(logp, 1 / logp.shape[-1]), reduction="none").sum(-1)
            assert g.certainty == pytest.approx(kl.mean().item(), rel=1e-3)


def test_cut_says_whether_the_end_was_reached(micro, monkeypatch):
    """A head that always prefers one token; the end counts as a token, and is not in the text."""
    model = micro.build()
    vocabulary, token = len(micro.tokenizer), micro.tokenizer("7").input_ids[0]

    def prefer(wanted):
        def head(hidden):
            logits = torch.zeros(*hidden.shape[:-1], vocabulary)
            logits[..., wanted] = math.log(3)
            return logits

        monkeypatch.setattr(model.lm_head, "forward", head)

    prefer(token)
    ((found,),) = sample(model, micro.tokenizer, [ask("a")], "a", system=None, max_new_tokens=5)
    p = 3 / (vocabulary + 2)
    uniform = -math.log(vocabulary) - (math.log(p) + (vocabulary - 1) * math.log(p / 3)) / vocabulary
    assert (found.text, found.tokens, found.cut) == ("77777", 5, True)
    assert math.isclose(found.logprob, 5 * math.log(p), rel_tol=1e-5)
    assert found.certainty == pytest.approx(uniform, rel=1e-3, abs=1e-6)
    prefer(micro.tokenizer.eos_token_id)
    ((found,),) = sample(model, micro.tokenizer, [ask("a")], "a", system=None, max_new_tokens=5)
    assert (found.text, found.tokens, found.cut) == ("", 1, False)


def test_draws_follow_the_distribution():
    """Chi-square-like: 20,000 draws of a known distribution, each share within five standard errors."""
    p = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.1])
    n = 20_000
    draws = torch.from_numpy(uniforms(0, "q", 0, n))
    for temperature, top_p, wanted in (
        (1.0, 1.0, p),
        (0.5, 1.0, p**2 / (p**2).sum()),
        (1.0, 0.74, torch.tensor([2 / 3, 1 / 3, 0, 0, 0])),  # the fewest that reach .74
        (1.0, 0.4, torch.tensor([1.0, 0, 0, 0, 0])),
    ):
        tokens = pick(p.log().expand(n, -1), draws, temperature, top_p)
        shares = torch.bincount(tokens, minlength=5) / n
        error = (wanted * (1 - wanted) / n).sqrt()
        assert ((shares - wanted).abs() <= 5 * error + 1e-12).all(), (temperature, top_p, shares)


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True),
       st.floats(0.01, 1), st.floats(0.1, 3))  # fmt: skip
@example([0.0, 1.0, 18.0], 0.0, 1.0, 1.0)  # where float32 rounds the likelier two to more than 1
def test_what_is_picked_is_in_the_nucleus(logits, draw, top_p, temperature):
    values = torch.tensor([logits])
    token = int(pick(values, torch.tensor([draw], dtype=torch.float64), temperature, top_p))
    p = (values[0] / temperature).softmax(-1).double()
    assert 0 <= token < len(logits)
    assert p[token] > 0
    if top_p < 1:  # with 1 every token may be picked
        assert p[p > p[token]].sum() < top_p + 1e-9, "more likely tokens alone already reach top_p"


@given(st.integers(0, 2**40), st.text(max_size=20), st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30))
def test_a_longer_row_of_draws_starts_with_the_shorter(seed, key, number, short, more):
    """So the limit of new tokens changes no token before it."""
    long = uniforms(seed, key, number, short + more)
    assert (uniforms(seed, key, number, short) == long[:short]).all() and (long >= 0).all() and (long < 1).all()


def test_golden_draws():
    """The pools that users keep depend on these: a change here is a change of every pool."""
    assert uniforms(0, "q", 0, 2).tolist() == [0.3206353017718079, 0.3475169289727904]


def test_nothing_asked_and_settings_out_of_range(micro, tiny):
    def run(questions=QUESTIONS[1:2], keys=("a",), **settings: Any):
        settings.setdefault("max_new_tokens", 2)
        return sample(tiny, micro.tokenizer, questions, keys, system="", **settings)

    assert run([], []) == [] and run(samples=()) == [[]]
    with pytest.raises(ValueError, match="as many keys"):
        run(keys=())
    for name, value in (("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name} {value} "):
            run(**{name: value})
