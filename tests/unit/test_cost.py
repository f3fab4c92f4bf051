"""What a stage cost, from ledgers on a clock that the test moves and notes of where attempts ran."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_accounts import Stage as Life

from cluster.shape import ClusterParams
from orchestrator.cli.costs import bill_lines
from orchestrator.cost import Bill, Cost, money, priced, stage_costs, told, union_s
from orchestrator.places import Places, read_places, telling, write_places
from orchestrator.store import MemoryStore
from stages.params import Resources

CLUSTER = ClusterParams.model_validate(
    {
        "head": {"price": 0.5},
        "nodes": {
            "h100": {"accelerator": "H100", "gpus": 8, "cpus": 192, "price": 80.0},
            "h100-spot": {"accelerator": "H100", "gpus": 8, "cpus": 192, "price": 32.0, "spot": True},
            "cpu": {"cpus": 16, "price": 1.6},
            "free-of-price": {"accelerator": "L4", "gpus": 1, "cpus": 4},
        },
    }
)
SPOT, STEADY, CPU = ({"stageline.io/node-type": name} for name in ("h100-spot", "h100", "cpu"))
GPU = Resources(workers=(1, 4), gpus=1, cpus=8)
HOUR = 3600.0


def on(*nodes: dict[str, str], cpus: float = 8, gpus: float = 1) -> Places:
    return Places(cpus, gpus, nodes)


def costs_of(life: Life, places: list[Places | None], resources=GPU, trains=True, now=None, cluster=CLUSTER):
    sums = life.account
    noted = {attempt.token: its for attempt, its in zip(sums.attempts, places) if its is not None}
    return stage_costs(cluster, resources, trains, sums, noted, now)


def completed(life: Life, steps: int, train_s: float) -> Life:
    return life.append("completed", manifest={}, summary={"steps": steps}, train_s=train_s)


def preempted_twice() -> Life:
    """An hour on 2 workers, announced; half an hour on 1, killed with 5 minutes unsaved; an hour on 2."""
    life = Life().claim().attempt(2).after(300).append("started", step=0).after(HOUR - 300).checkpoint(330, 3240.0)
    life.append("preempted", step=330, reason="spot")
    life.after(7200).attempt(1).after(60).append("started", step=330).after(1440).checkpoint(402, 1400.0)
    life.after(300).append("failed", error_class="lost_node", message="gone", step=417)
    life.attempt(2).after(360).append("started", step=402).after(HOUR - 360)
    return completed(life, 720, 3200.0)


def test_two_preemptions_by_hand():
    """A GPU of eight: 4 USD an hour on spot, 10 on demand. The two hours in the queue between the first attempts cost
    nothing."""
    costs = costs_of(preempted_twice(), [on(SPOT, SPOT), on(STEADY), on(SPOT, STEADY)])
    assert [cost.total for cost in costs] == pytest.approx([8.0, 10.0 * 0.5, 14.0])
    wasted = [8.0 * 360 / 3600, 10.0 * 400 / 3600, 14.0 * 400 / 3600]
    assert [cost.wasted for cost in costs] == pytest.approx(wasted)
    assert told(costs, "USD") == f"27.00 USD ({sum(wasted):.2f} wasted)"


@pytest.mark.parametrize(
    "worker, hourly",
    [
        (on(SPOT), 4.0),  # a GPU of eight
        (on(SPOT, cpus=48), 8.0),  # a quarter of the cores is more
        (on(SPOT, gpus=0, cpus=24), 4.0),
        (on(CPU, gpus=0, cpus=4), 0.4),
        (on(CPU, gpus=0, cpus=20), 1.6),  # a machine larger than declared: all of it
        (on({"ray.io/accelerator-type": "H100", "ray.io/market-type": "spot"}), 4.0),
        (on({"stageline.io/node-type": "?", "ray.io/accelerator-type": "H100", "ray.io/market-type": "spot"}), 4.0),
        (on({"ray.io/accelerator-type": "H100", "ray.io/market-type": "on-demand"}), 10.0),
        (on({"ray.io/market-type": "on-demand"}, gpus=0, cpus=4), 0.4),
        (on({"ray.io/accelerator-type": "H100"}), None),  # spot or not?
        (on({"ray.io/accelerator-type": "A100", "ray.io/market-type": "spot"}), None),
        (on({"ray.io/market-type": "on-demand"}), None),  # a GPU on a machine that has none
        (on({"stageline.io/node-type": "free-of-price"}), None),
        (on(SPOT, {}), None),  # one of two is unknown
        (on({}, gpus=0), None),
        (None, None),
    ],
)  # fmt: skip
def test_an_hour_of_a_worker(worker, hourly):
    life = completed(Life().claim().attempt().append("started", step=0).after(HOUR), 10, HOUR)
    (cost,) = costs_of(life, [worker])
    assert cost == (Cost(unknown=1) if hourly is None else Cost(pytest.approx(hourly)))


def test_what_is_unknown_is_said_and_in_no_sum():
    costs = costs_of(preempted_twice(), [on(SPOT, SPOT), None, on({})])
    assert told(costs, "EUR") == "8.00 EUR (0.80 wasted) + 2 attempts of unknown cost"
    assert told(costs[1:], "EUR") == "unknown" and told([], "EUR") == ""


def test_an_attempt_that_runs_costs_until_now_and_its_newest_steps_are_not_judged():
    life = Life().claim().attempt().after(600).append("started", step=0).after(1200).checkpoint(10, 1200.0)
    (cost,) = costs_of(life, [on(SPOT)], now=life.now + 1800)
    assert cost.total == pytest.approx(4.0) and cost.wasted == pytest.approx(4.0 * 600 / 3600)
    (cost,) = costs_of(life, [on(SPOT)])
    assert cost.total == pytest.approx(2.0), "its driver is gone: to its newest entry"


def test_days_in_which_nobody_knew_that_the_driver_was_lost_cost_nothing():
    life = Life().claim().attempt().after(600).append("started", step=0).after(3000).checkpoint(10, 3000.0)
    life.after(5 * 86400).claim().append("failed", error_class="lost_node", message="its driver was lost", step=12)
    (cost,) = costs_of(life, [on(SPOT)])
    assert cost.total == pytest.approx(4.0)


def test_steps_behind_a_damaged_checkpoint_are_wasted_after_all():
    life = Life().claim().attempt().append("started", step=0).after(1800).checkpoint(10, 1800.0)
    life.after(1800).checkpoint(20, 1800.0).append("preempted", step=20, reason="")
    assert costs_of(life, [on(SPOT)])[0].wasted == 0.0
    life.attempt().append("started", step=10)
    assert costs_of(life, [on(SPOT), on(SPOT)])[0].wasted == pytest.approx(2.0)


def test_stages_that_do_not_train_cost_at_most_their_most_workers_on_the_dearest_that_fits():
    life = Life().claim().attempt(2).after(HOUR).append("failed", error_class="bug", message="", step=0)
    life.attempt(4).after(HOUR / 2)
    costs = costs_of(completed(life, 0, 0.0), [], Resources(workers=4, cpus=6), trains=False)
    hourly = 4 * 80.0 * 6 / 192  # of h100; 4 x 1.60 x 6 / 16 on the cheapest
    assert costs == [Cost(hourly, hourly, at_most=True), Cost(hourly / 2, 0.0, at_most=True)]
    assert told(costs, "USD") == "at most 15.00 USD (10.00 wasted)"
    (cost, _) = costs_of(life, [], Resources(workers=4, cpus=4, labels={"ray.io/market-type": "spot"}), trains=False)
    assert cost.total == pytest.approx(4 * 32.0 * 4 / 192)
    nowhere = Resources(labels={"stageline.io/node-type": "free-of-price"})
    assert told(costs_of(life, [], nowhere, trains=False), "USD") == "unknown"
    beside = Resources(workers=4, cpus=4)  # fits on the type without a price as well, which may be the dearest
    assert told(costs_of(life, [], beside, trains=False), "USD") == "unknown"


def test_a_bill_counts_two_names_of_a_stage_once_and_the_head_apart():
    bill, life = Bill(CLUSTER), preempted_twice()
    sums = life.account
    stage = SimpleNamespace(params=SimpleNamespace(resources=GPU), kind=SimpleNamespace(trains=True))
    places = {attempt.token: on(SPOT, SPOT) for attempt in sums.attempts}
    assert bill.head is None
    first, second = (bill.add(stage, sums, "stages/train/a", places) for _ in range(2))  # pyright: ignore
    assert first == second == bill.costs
    assert bill.head == pytest.approx(0.5 * 2.5) and bill.head_s == 2.5 * HOUR, "not while it was queued"
    beside = Life().claim().attempt().after(2 * HOUR)  # of the hour before the first preemption, and one in the queue
    bill.add(stage, beside.account, "stages/train/b", {}, now=beside.now)  # pyright: ignore
    assert len(bill.costs) == 4 and bill.head == pytest.approx(0.5 * 3.5)


def test_the_head_of_a_stage_that_was_reused_a_month_later_did_not_wait_for_it():
    """Two stages of ten minutes each."""
    bill = Bill(CLUSTER)
    stage = SimpleNamespace(params=SimpleNamespace(resources=GPU), kind=SimpleNamespace(trains=True))
    for name, later in (("a", 0.0), ("b", 30 * 86400.0)):
        life = completed(Life().after(later).claim().attempt().after(600), 10, 600.0)
        bill.add(stage, life.account, f"stages/train/{name}", {})  # pyright: ignore
    assert bill.head_s == 1200.0 and bill.head == pytest.approx(0.5 / 3)
    assert bill_lines(bill)[-1] == "cost of the head: 0.17 USD, 20 min 00 s in which stages ran"


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e5)), min_size=1, max_size=8))
def test_time_counts_once_however_many_attempts_go_on(pairs):
    spans = [(began, began + seconds) for began, seconds in pairs]
    found = union_s(spans)
    assert found == pytest.approx(union_s(spans[::-1] * 2), abs=1e-6)
    longest, every = max(end - began for began, end in spans), sum(end - began for began, end in spans)
    assert longest - 1e-6 <= found <= every + 1e-6
    points = sorted({point for span in spans for point in span})
    by_pieces = sum(b - a for a, b in pairwise(points) if any(x <= a and b <= y for x, y in spans))
    assert found == pytest.approx(by_pieces, abs=1e-6)


def test_nothing_is_said_where_there_are_no_prices():
    assert priced(None) is None
    assert priced(ClusterParams.model_validate({"nodes": {"a": {"cpus": 1}}})) is None
    assert priced(CLUSTER) is CLUSTER
    assert priced(ClusterParams.model_validate({"nodes": {"a": {"cpus": 1, "price": 0}}})) is not None


def test_amounts():
    assert [money(amount, "USD") for amount in (0, 0.001, 0.5, 12.4, 999.99, 1204.6)] == [
        "0.00 USD", "< 0.01 USD", "0.50 USD", "12.40 USD", "999.99 USD", "1,205 USD",
    ]  # fmt: skip


def test_the_note_of_an_attempt_comes_back():
    store = MemoryStore()
    node = telling({"ray.io/node-id": "ab", "stageline.io/node-type": "cpu", "ray.io/market-type": "spot"})
    assert node == {"stageline.io/node-type": "cpu", "ray.io/market-type": "spot"}
    write_places(store, "p", (1, 2), on(node, {}))
    write_places(store, "p", (2, 1), on(CPU, gpus=0))
    assert read_places(store, "p") == {(1, 2): on(node, {}), (2, 1): on(CPU, gpus=0)}
    assert read_places(store, "other") == {}


@st.composite
def lives(draw) -> tuple[Life, list[Places | None]]:
    """A stage's attempts in any order of ends, with useful seconds that fit into them or, by skewed clocks, do not."""
    seconds = st.floats(0, 5000)
    life, step, places = Life().claim(), 0, []
    for _ in range(draw(st.integers(1, 5))):
        workers = draw(st.integers(1, 3))
        life.after(draw(seconds)).attempt(workers)
        places.append(draw(st.sampled_from([None, on(*[SPOT] * workers), on(*[STEADY] * workers), on({})])))
        if draw(st.booleans()):
            life.after(draw(seconds)).append("started", step=step)
            for _ in range(draw(st.integers(0, 3))):
                step += 10
                life.after(draw(seconds)).checkpoint(step, draw(seconds))
        ended = draw(st.sampled_from(["preempted", "lost", "driver", "completed"]))
        life.after(draw(seconds))
        if ended == "preempted":
            life.append("preempted", step=step, reason="")
        elif ended == "completed":
            completed(life, step, draw(seconds))
            break
        else:
            if ended == "driver":
                life.claim()
            life.append("failed", error_class="lost_node", message="", step=step + draw(st.integers(0, 9)))
            step = max(0, step - 10 * draw(st.integers(0, 1)))
    return life, places


@given(lives(), st.booleans(), st.sampled_from([None, 0.0, 1e5]))
def test_wasted_is_a_part_and_the_unknown_are_counted(given_life, trains, later):
    life, places = given_life
    now = None if later is None else life.now + later
    costs = costs_of(life, places, trains=trains, now=now)
    assert len(costs) == len(life.account.attempts)
    assert all(0 <= cost.wasted <= cost.total for cost in costs)
    assert sum(costs, Cost()).unknown == (sum(its is None or {} in its.nodes for its in places) if trains else 0)
    useful = sum(attempt.useful_s for attempt in life.account.attempts)
    assert useful == pytest.approx(life.account.useful_s), "every second that counts is an attempt's"


@given(lives(), st.floats(0, 1000), st.floats(0, 1000))
def test_a_dearer_machine_makes_nothing_cheaper(given_life, price, more):
    life, places = given_life

    def at(price: float) -> list[Cost]:
        spot = CLUSTER.nodes["h100-spot"].model_copy(update={"price": price})
        cluster = CLUSTER.model_copy(update={"nodes": {**CLUSTER.nodes, "h100-spot": spot}})
        return costs_of(life, places, cluster=cluster)

    for cheap, dear in zip(at(price), at(price + more)):
        assert dear.total >= cheap.total and dear.wasted >= cheap.wasted and dear.unknown == cheap.unknown


@given(st.floats(0, 5000), st.lists(st.floats(0.1, 5000), min_size=1, max_size=5), st.integers(1, 4))
def test_an_undisturbed_run_wastes_its_start_only(start, segments, workers):
    life = Life().claim().attempt(workers).after(start).append("started", step=0)
    for number, seconds in enumerate(segments[:-1], 1):
        life.after(seconds).checkpoint(number, seconds)
    completed(life.after(segments[-1]), len(segments), segments[-1])
    (cost,) = costs_of(life, [on(*[SPOT] * workers)])
    assert cost.wasted == pytest.approx(4.0 * workers * start / HOUR, abs=1e-6)
    assert cost.total == pytest.approx(4.0 * workers * (start + sum(segments)) / HOUR)
