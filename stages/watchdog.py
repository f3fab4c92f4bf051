"""A step that does not come to an end: the stacks of all threads of every rank, then the end of the process.

One rank that hangs holds all others in their next collective, so every rank's watchdog fires within the same time and
the stacks of all lie side by side in the logs. A process that hangs inside a collective cannot be asked to raise.
"""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls hung(stacks) in a thread when `limit_s` seconds pass without a beat(); ends with the `with` block."""

    def __init__(self, limit_s: float, hung: Callable[[str], None]):
        self.limit_s, self.hung = limit_s, hung
        self._beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def beat(self) -> None:
        self._beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self.limit_s / 4)):
            if time.monotonic() - self._beat > self.limit_s:
                try:
                    text = stacks()
                except OSError as error:  # no room for a temporary file
                    text = f"the stacks could not be taken: {error}"
                self.hung(f"no step came to an end for {self.limit_s:g} s\n{text}")
                return


def stacks() -> str:
    """Of all threads of this process, innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
