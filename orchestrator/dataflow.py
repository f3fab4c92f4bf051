"""The only file that imports ray.data: a function over many items, streamed through the cluster.

Ray Data starts as many tasks as there is room for (at most `workers`), keeps the results that nobody has taken yet
within its memory, makes a result again that was lost with a node, and gives each as soon as it is there, in no order.
It costs 1.5 to 3 s to begin, and some 10 ms for each item (2 cores): give it items of seconds.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from modeling.errors import UserError
from orchestrator.redaction import guarded
from stages.params import Resources

RETRIES = 3  # of an item whose process has died; Ray Data's own number is without limit


def stream(function: Callable[..., Any], items: Sequence[Any], resources: Resources) -> Iterator[Any]:
    """The results of a module-level function, as they come. A class is made once per process (an actor of its pool),
    and its object called; only such a one gets the GPUs. Raises what the function raised. Closing it ends what runs.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
    from ray.exceptions import RayTaskError

    if not items:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False  # the driver shows its own line
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, and told once
    # there is no other way yet to say how often a task is tried again; pyproject.toml keeps Ray below 2.61
    warnings.filterwarnings("ignore", message="`ray_remote_args")
    pool: dict[str, Any]
    if isinstance(function, type):
        most = min(resources.most, len(items))  # all are asked for at once; as many as there is room for start
        strategy = ActorPoolStrategy(min_size=1, initial_size=most, max_size=most)
        pool = {"compute": strategy, "fn_constructor_args": (function,), "num_gpus": resources.gpus or None}
        retries: dict[str, Any] = {"max_restarts": RETRIES, "max_task_retries": RETRIES}
    else:
        pool = {"compute": TaskPoolStrategy(size=min(resources.most, len(items))), "fn_args": (function,)}
        retries = {"max_retries": RETRIES}
    if resources.selector:
        retries |= {"label_selector": resources.selector}
    call: Any = _Caller if isinstance(function, type) else _call
    data = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items)).map(
        call,
        num_cpus=resources.cpus,
        ray_remote_args_fn=lambda: retries,
        **pool,
    )
    try:
        for row in data.iter_rows():
            yield row["result"]
    except RayTaskError as error:
        if isinstance(error.cause, UserError | ConnectionError):
            raise error.cause from None
        raise


def _call(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    with guarded():
        return {"result": function(row["item"])}


class _Caller:
    def __init__(self, kind: type):
        with guarded():
            self._function: Any = kind()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with guarded():
            return {"result": self._function(row["item"])}
