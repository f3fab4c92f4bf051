"""Whether the nodes of a cluster are fit to train on: pure, from what each says of itself (cluster/facts.py).

Invariant: a problem is something with which a run fails or gives wrong figures; a remark is something that costs speed
or may confuse. Each says which nodes, what was found and what to do.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from cluster.facts import Facts
from cluster.nodes import Place

SKEW_REMARK_S, SKEW_PROBLEM_S = 1.0, 10.0  # ledgers carry times of several machines; none decides anything
SHARED_BYTES = 2e9  # of /dev/shm: Ray's object store spills to disk where it is smaller than its share of memory
DISK_BYTES = 20e9  # for a model and a checkpoint under way
FILES = 4096  # that a process may open


def problems(nodes: Sequence[Facts]) -> list[str]:
    """What has to be mended before anything is run."""
    found = []
    for name in sorted({name for node in nodes for name in node.versions}):
        by_version = _grouped(nodes, lambda node, name=name: node.versions.get(name, "not installed"))
        if len(by_version) > 1:
            told = "; ".join(f"{version} on {hosts}" for version, hosts in by_version.items())
            what = "the project's code" if name == "stageline" else name
            remedy = "submit from one checkout" if name == "stageline" else "use one image, or install the same version"
            found.append(f"{what} differs: {told} → {remedy} on all nodes")
        elif set(by_version) == {"not installed"}:
            found.append(f"{name} is not installed on any node → install what pyproject.toml lists")
    broken = [node for node in nodes if node.torch and node.versions.get("torch") != "not installed"]
    for reason, hosts in _grouped(broken, lambda node: node.torch).items():
        found.append(f"torch cannot be imported on {hosts}: {reason} → install it anew there")
    for reason, hosts in _grouped(nodes, lambda node: node.storage).items():
        if reason:
            found.append(f"storage from {hosts}: {reason}")
    for host, seconds in skews(nodes).items():
        if abs(seconds) > SKEW_PROBLEM_S:
            found.append(f"the clock of {host} is {seconds:+.1f} s off → run chrony or systemd-timesyncd on it")
    return found


def remarks(nodes: Sequence[Facts]) -> list[str]:
    """What works, but not as well as it could."""
    found = []
    small = [node for node in nodes if node.shared < SHARED_BYTES]
    if small:
        found.append(
            f"/dev/shm is small on {_hosts(small)} ({min(node.shared for node in small) / 1e9:.1f} GB) → mount a "
            "larger one (Kubernetes: an emptyDir with medium Memory; Docker: --shm-size)"
        )
    full = [node for node in nodes if node.disk < DISK_BYTES]
    if full:
        found.append(
            f"little room for temporary files on {_hosts(full)} ({min(node.disk for node in full) / 1e9:.0f} GB) → set "
            "TMPDIR to a larger disk"
        )
    few = [node for node in nodes if node.files < FILES]
    if few:
        found.append(f"a process may open {min(n.files for n in few)} files on {_hosts(few)} → ulimit -n 65536")
    for host, seconds in skews(nodes).items():
        if SKEW_REMARK_S < abs(seconds) <= SKEW_PROBLEM_S:
            found.append(f"the clock of {host} is {seconds:+.1f} s off: times in reports are that far off")
    names = _grouped([node for node in nodes if node.gpus], lambda node: ", ".join(sorted(set(node.gpus))))
    if len(names) > 1:
        told = "; ".join(f"{gpus} on {hosts}" for gpus, hosts in names.items())
        found.append(f"GPUs of several types: {told} → name one in `resources.accelerator`; the slowest sets the pace")
    return found


def measurable(nodes: Sequence[tuple[Place, Facts]]) -> tuple[dict[str, list[Place]], list[str]]:
    """({backend: the nodes whose all-reduce can be measured now}, why others are left out). A backend is named where a
    node would train with it: GPU nodes train over NCCL, the others over gloo."""
    groups: dict[str, list[Place]] = {}
    left_out = []
    for place, its in nodes:
        what = "GPU" if place.total["GPU"] >= 1 else "CPU"
        if not place.total[what] or its.torch:
            continue  # a head that trains nothing; without torch it is a problem already
        group = groups.setdefault("NCCL" if what == "GPU" else "gloo", [])
        if place.free[what] < min(1.0, place.total[what]):
            left_out.append(f"not measured on {its.host}: its {what}s are in use")
        elif what == "GPU" and not its.gpus:
            left_out.append(f"not measured on {its.host}: torch sees none of its GPUs")
        else:
            group.append(place)
    return groups, left_out


def skews(nodes: Sequence[Facts]) -> dict[str, float]:
    """Seconds from the median clock, by host. `time` has to be corrected for when each was asked."""
    if not nodes:
        return {}
    middle = sorted(node.time for node in nodes)[len(nodes) // 2]
    return {node.host: node.time - middle for node in nodes}


def _grouped(nodes: Iterable[Facts], key) -> dict[str, str]:
    """Hosts by what they say, the most common first."""
    groups: dict[str, list[Facts]] = defaultdict(list)
    for node in nodes:
        groups[key(node)].append(node)
    return {value: _hosts(its) for value, its in sorted(groups.items(), key=lambda item: -len(item[1]))}


def _hosts(nodes: Sequence[Facts]) -> str:
    names = sorted(node.host for node in nodes)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
