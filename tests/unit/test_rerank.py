"""Re-ranking: one score for each sample, one reading for what reads the same, prompts that mean what they say."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling import judging
from modeling.errors import UserError
from modeling.generate import Question
from stages.evaluate.rerank import PROMPT, check_prompt, judged, verifier_turns


def ask(text, before=()):
    return Question([*before, {"from": "human", "value": text}], ())


QUESTIONS = [ask("two plus two"), ask("Which?"), ask("nothing was sampled")]
RESPONSES = [["4", "five", "4", "4"], ["first\nsecond", "4"], []]


@pytest.fixture
def readers(monkeypatch):
    """Stand-ins for the model: a score that depends on the text alone; calls are kept."""
    calls = SimpleNamespace(turns=[], words=[], sizes=[], pairs=[])

    def choice(model, tokenizer, questions, words, *, system):
        calls.turns += [question.conversation for question in questions]
        calls.words.append(words)
        calls.sizes.append(len(questions))
        return [len(question.conversation[-1]["value"]) / 1000 for question in questions]

    def steps(model, tokenizer, questions, responses, *, system):
        calls.pairs += [(q.conversation[-1]["value"], r) for q, r in zip(questions, responses, strict=True)]
        return [[len(step) / 10 for step in judging.steps_of(response)] for response in responses]

    monkeypatch.setattr(judging, "choice_probability", choice)
    monkeypatch.setattr(judging, "step_scores", steps)
    return calls


def score(kind, prompt=None, responses=None, batch=2, **more):
    return judged(kind, prompt, None, None, QUESTIONS, responses or RESPONSES, "", batch, **more)


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_what_reads_the_same_is_judged_once(readers, batch):
    scores = score("verifier", batch=batch)
    assert [len(row) for row in scores] == [4, 2, 0]
    assert sum(readers.sizes) == len(readers.turns) == 4 and max(readers.sizes) <= batch
    assert scores[0][0] == scores[0][2] == scores[0][3] != scores[0][1]
    assert scores[1][1] != scores[0][0], "the same response to another question is another thing"
    asked = [PROMPT.replace("{question}", q).replace("{response}", r) for q, r in (
        ("two plus two", "4"), ("two plus two", "five"), ("Which?", "first\nsecond"), ("Which?", "4"))]  # fmt: skip
    assert [turns[-1]["value"] for turns in readers.turns] == asked
    assert scores == [[len(asked[i]) / 1000 for i in row] for row in ([0, 1, 0, 0], [2, 3], [])]


def test_an_outcome_scorer_reads_the_whole_response_in_its_form(readers):
    score("outcome")
    assert set(readers.words) == {("+", "-")}
    assert [turn["value"] for turns in readers.turns for turn in turns][2] == (
        "### Question:\nWhich?\n\n### Solution Process:\nfirst\nsecond"
    )


def test_a_process_scorer_is_averaged_over_steps(readers):
    responses = [["ab\nabcd\nabcdef", "", "\n"], [], []]
    assert score("process", responses=responses)[0] == pytest.approx([0.4, 0, 0])
    assert score("process", responses=responses, aggregate="min")[0][0] == pytest.approx(0.2)
    assert score("process", responses=responses, aggregate="max")[0][0] == pytest.approx(0.6)


BRACES = st.text(alphabet="{question}{response} x\n", max_size=60) | st.sampled_from(["{question}", "a {response}"])


@given(BRACES, BRACES)
def test_neither_question_nor_response_is_a_prompt(question, response):
    """Braces in them stay what they are: only the prompt's own are filled in, once."""
    (turn,) = verifier_turns([{"from": "human", "value": question}], response, "Q {question} R {response} ?")
    assert turn["value"] == f"Q {question} R {response} ?"


def test_history_and_pictures_stay_where_they_were():
    before = [{"from": "human", "value": "<image>\nLook."}, {"from": "gpt", "value": "ok"}]
    turns = verifier_turns([*before, {"from": "human", "value": "<image>\nAnd now?"}], "I see <image>", PROMPT)
    assert turns[:2] == before and sum(turn["value"].count("<image>") for turn in turns) == 2


@pytest.mark.parametrize("prompt", ["Is it right?", "{question}", "{response}", "{question} {response} {response}"])
def test_a_prompt_that_shows_not_both_is_refused(readers, prompt):
    with pytest.raises(UserError, match="must hold"):
        check_prompt(prompt)
    with pytest.raises(UserError, match="must hold"):
        score("verifier", prompt)


def test_it_reads_real_models(micro):
    """All three kinds against a random model: probabilities, the same in any batch."""
    model = micro.build(seed=1)
    for kind in ("verifier", "outcome", "process"):
        one, three = (judged(kind, None, model, micro.tokenizer, QUESTIONS, RESPONSES, None, batch) for batch in (1, 3))
        assert [len(row) for row in one] == [4, 2, 0] and all(0 < p < 1 for row in one for p in row)
        assert [p for row in three for p in row] == pytest.approx([p for row in one for p in row], rel=1e-3)
