"""Many seeded interleavings of drivers, ranks, retention and gc (tests/unit/simulation.py), and mutations of the code.

    python benchmarks/simulate.py [--seeds 5000] [--start 0]

Prints how much happened, how long it took, and what was violated (nothing, or it ends with 1).
"""

import argparse
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))

from simulation import World, told
from simulation_mutations import MUTATIONS, first_failure

DOUBLE = ("one entry each", "one claim each", "one attempt each", "one result", "refused appends do nothing")
LOST = ("entries last", "returned appends count", "what counts stays", "no step is lost", "the newest stay")
TORN = ("commits are whole", "resumed as left")
SHOWN = ("operations", "attempts", "takeovers", "fenced", "kills", "stops", "zombies", "ambiguous", "damaged",
         "commits", "removed", "removed by gc")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    seeds = range(options.start, options.start + options.seeds)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}, Python {platform.python_version()}")

    counts: Counter[str] = Counter()
    violations: Counter[str] = Counter()
    wall, cpu = time.perf_counter(), time.process_time()
    for seed in seeds:
        world = World(seed).run()
        counts += world.counts
        for violation in world.violations:
            violations[violation.split(":")[0]] += 1
        if world.violations:
            print(told(world))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{len(seeds):,} interleavings in {wall:.1f} s ({cpu:.1f} s of one core)")
    print(", ".join(f"{name} {counts[name]:,}" for name in SHOWN))
    double, lost, torn = (sum(violations[name] for name in names) for names in (DOUBLE, LOST, TORN))
    other = violations.total() - double - lost - torn
    print(f"violations: double commits {double}, lost commits {lost}, torn states {torn}, others {other}")

    missed = 0
    for mutation in MUTATIONS:
        found = first_failure(seeds, mutation)
        missed += found is None
        told_by = "NOT FOUND" if found is None else f"seed {found.seed}: {found.violations[0].split(':')[0]}"
        print(f"without {mutation.what:45} {told_by}")
    return 1 if violations or missed else 0


if __name__ == "__main__":
    sys.exit(main())
