"""Names a running attempt on the Ray dashboard: an actor called experiment/stage/attempt.

Ray 2.60's dashboard has no page of Ray Train's runs (its API has: /api/train/v2/runs/v1), and the actors of Ray Train
bear no names. So each attempt has one more, on the driver's node, without CPUs: its line on the Actors page says which
stage runs since when, its log how far it is, and both stay when the attempt is over.
"""

import sys
import time
from typing import Any

from orchestrator.checkpoints import token_name
from orchestrator.ledger import Token


class Marker:
    """Of one stage; show() whenever its newest attempt may be another, close() at its end."""

    def __init__(self, experiment: str, stage: str):
        self._name, self._token, self._actor = f"{experiment}/{stage}", (0, 0), None

    def show(self, token: Token) -> None:
        """Returns at once. token: of the running attempt; (epoch, 0) where none ran so far."""
        if token != self._token:
            self.close()
            self._token = token
            self._actor = _start(f"{self._name}/{token_name(token)}") if token[1] else None

    def say(self, text: str) -> None:
        """A line of its log. Returns at once."""
        if self._actor is not None:
            self._actor.say.remote(text)

    def close(self) -> None:
        """Ray ends an actor that nobody refers to."""
        self._actor = None


def _start(name: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(StageAttempt).options(name=name, scheduling_strategy=here).remote()


class StageAttempt:
    """Ray shows the name of the class beside that of the actor."""

    def say(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)  # the log that its page opens with
