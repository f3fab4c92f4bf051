"""What an epoch trains is told before it is trained: shares are exact, and those of the plan of steps."""

from fractions import Fraction

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from modeling.epochs import plan_steps
from stages.prepare import shares
from stages.prepare.shares import Part, count_parts, merge_parts, token_shares

ROWS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["image", "text", "video"]),
        st.sampled_from([0.1, 1.0, 1.5, 3.0]),
        st.integers(0, 2**31 - 1),
        st.integers(0, 100),
        st.integers(0, 48),
    )
)


def table(rows) -> pa.Table:
    kinds = (pa.string(), pa.string(), pa.float64(), pa.int32(), pa.int32(), pa.int16())
    columns = zip(*rows) if rows else [[]] * len(kinds)
    return pa.table(
        {name: pa.array(list(c), kind) for name, c, kind in zip(shares.COLUMNS, columns, kinds, strict=True)}
    )


@given(ROWS)
def test_shares_are_exact_and_sum_to_one(rows):
    parts = count_parts(table(rows))
    assert sum(part.samples for part in parts) == len(rows)
    for by in (shares.by_set_and_type, shares.by_type, shares.by_set):
        found = token_shares(parts, by)
        assert sum(found.values()) == (1 if any(row[3] for row in rows) else 0)
        if found:
            whole = sum(Fraction(row[2]) * row[3] for row in rows)
            texts = sum(Fraction(row[2]) * row[3] for row in rows if row[1] == "text")
            assert token_shares(parts, shares.by_type).get("text", 0) == texts / whole


@given(ROWS, st.integers(0, 10))
def test_a_table_in_pieces_gives_the_same_parts(rows, cut):
    pieces = count_parts(table(rows[:cut])) + count_parts(table(rows[cut:]))
    assert merge_parts(pieces) == count_parts(table(rows))


def test_tokens_of_an_epoch_are_those_that_the_plan_of_steps_trains():
    repeats = {"whole": 2.0, "half": 0.5, "more": 1.5}
    rows = [(name, "text", repeat, 30, 10, 0) for name, repeat in repeats.items() for _ in range(40)]
    columns = table(rows)
    plan = plan_steps(
        columns["mean_tokens"].to_numpy(),
        columns["tiles"].to_numpy(),
        columns["repeat"].to_numpy(),
        max_tokens=100,
        max_tiles=4,
        global_batch=2,
        seed=0,
        epochs=1,
        groups=np.repeat(range(3), 40),
    )
    trained = dict(zip(repeats, (np.bincount(plan.sample // 40) * 30).tolist()))
    assert {part.dataset: part.epoch_tokens for part in count_parts(columns)} == trained


def test_summary_names_types_sets_and_the_whole():
    parts = [Part("a", "image", 2.0, 1, 300, 10, 1), Part("b", "text", 0.5, 4, 800, 20, 0)]
    assert shares.summary(parts) == {
        "tokens_per_epoch": 1000.0,
        "by_type": {"image": 0.6, "text": 0.4},
        "by_set": {"a": 0.6, "b": 0.4},
    }
    assert shares.summary([]) == {"tokens_per_epoch": 0.0, "by_type": {}, "by_set": {}}
