"""SkyPilot: the experiment as one managed job on as many equal machines as it needs, in whichever market has them.

Invariant: nothing is lost when SkyPilot starts the job anew on other machines, as it does when one is taken: the driver
runs on the first of them, and all that counts is in storage. Ray's token and S3 keys are `secrets` without values.
SkyPilot runs a Ray of its own on other ports; `ray stop` would end it, so nothing here calls it.

Read in SkyPilot 0.14 (sky/skylet/subprocess_daemon.py): every second it notes what is below a script, and kills what it
noted last when the script has ended. So nothing that is to outlive a worker's script may still be below it: Ray's
daemons are not once `ray start` has ended, the agent is started by a subshell that ends at once, and the script waits a
little. SkyPilot's own sky_templates/ray/start_cluster waits as long, and gives Ray's agent the same other port.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.manifests.common import (
    ENV_FILE,
    FILE,
    HOLDS_STAGELINE,
    PORT,
    Launch,
    labels_option,
    object_store,
    render,
    whole,
)
from cluster.shape import NodeParams
from modeling.errors import UserError

SECRETS = ("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
NAMES = {"A100-40G": "A100", "A100-80G": "A100-80GB"}  # Ray's names of GPUs -> SkyPilot's, where they differ
DISK_GB = 300
AGENT_PORT = 52366  # of the agent of Ray's dashboard: SkyPilot's own Ray holds 52365
SETTLE_S = 5  # after `ray start`, before a script may end
END = "END_OF_EXPERIMENT"


def write(launch: Launch, types: Sequence[str], count: int) -> dict[str, str]:
    """{file name: text}. types: the node types of which all machines may be, alike; count: machines."""
    nodes = [launch.cluster.nodes[name] for name in types]
    comment = f"""{launch.name}: a managed job of SkyPilot on {count} equal machine{"s" if count > 1 else ""}.

  (umask 077; editor ~/{ENV_FILE})     # NAME=value lines: {", ".join(SECRETS)}
  sky jobs launch skypilot.yaml --secret-file ~/{ENV_FILE}

The driver runs on the first machine: with spot machines it goes with it, and goes on where it was. Elsewhere (KubeRay,
`ray up`) it has a machine of its own, and workers may be of several types.
The image has to hold Ray and Stageline (see the Dockerfile of the project).
"""
    task = {
        "name": launch.slug(40),
        "num_nodes": count,
        "resources": {
            "image_id": f"docker:{launch.image}",
            "disk_size": DISK_GB,
            "job_recovery": {"strategy": "FAILOVER", "max_restarts_on_errors": 2},
            "any_of": [_resources(launch, name) for name in types],
        },
        "secrets": dict.fromkeys(SECRETS),
        "setup": _setup(launch),
        "run": _run(launch, common_labels(launch, types), min(nodes, key=object_store)),
    }
    return {"skypilot.yaml": render(comment, task)}


def common_labels(launch: Launch, types: Sequence[str]) -> dict[str, str]:
    """The labels that a machine has whichever type it is: SkyPilot tells a machine nothing of the choice."""
    sets = [launch.cluster.nodes[name].labels(name).items() for name in types]
    return {key: value for key, value in sets[0] if all((key, value) in other for other in sets)}


def _resources(launch: Launch, name: str) -> dict[str, Any]:
    cluster, node = launch.cluster, launch.cluster.nodes[name]
    where = "/".join(part for part in (cluster.provider, cluster.region, cluster.zone) if part)
    found: dict[str, Any] = {"infra": where} if cluster.provider else {}
    if node.instance and cluster.provider:
        found["instance_type"] = node.instance
    else:
        found |= {"cpus": f"{node.cpus:g}+", "memory": f"{node.memory:g}+"}
    if node.accelerator:
        found["accelerators"] = f"{NAMES.get(node.accelerator, node.accelerator)}:{node.gpus}"
    elif node.gpus and "instance_type" not in found:
        raise UserError(f"has {node.gpus} GPUs of an unknown type", where=f"{launch.file}: cluster.nodes.{name}",
                        remedy="add 'accelerator:' (H100, A100-80G, L4 ...)")  # fmt: skip
    return found | {"use_spot": node.spot}


def _setup(launch: Launch) -> str:
    end = END
    while re.search(rf"^{end}$", launch.text, re.M):
        end += "_"
    lines = [
        "set -e",
        f"cat > ~/{FILE} <<'{end}'",
        launch.text.rstrip("\n"),
        end,
        *launch.cluster.setup,
        HOLDS_STAGELINE,
    ]
    return "\n".join(lines) + "\n"


def _run(launch: Launch, labels: Mapping[str, str], node: NodeParams) -> str:
    source = launch.cluster.provider or "auto"
    options = [f"--num-cpus={whole(node.cpus)}", f"--num-gpus={node.gpus}"]
    options += [f"--object-store-memory={object_store(node)}", labels_option(labels)]
    run = ["stageline", "run", FILE, *launch.overrides, "--address", f"$HEAD:{PORT}"]
    return f"""set -e
cd ~
export RAY_AUTH_MODE=token
HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n1)
NODE="{" ".join(options)} --metrics-export-port=8080 --dashboard-agent-listen-port={AGENT_PORT}"
watch_notices() {{
  (nohup setsid flock -n /tmp/notice-agent.lock \\
    python -m cluster.agent --address $HEAD:{PORT} --source {source} > /tmp/notice-agent.log 2>&1 < /dev/null &)
  sleep {SETTLE_S}  # what is still below this script when it ends, SkyPilot ends too
}}
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
  until ray health-check --address $HEAD:{PORT} 2>/dev/null; do sleep 2; done
  ray start --address=$HEAD:{PORT} $NODE
  watch_notices
  exit 0
fi
ray health-check --address $HEAD:{PORT} 2>/dev/null ||
  ray start --head --port={PORT} --dashboard-host=127.0.0.1 $NODE
watch_notices
{_join(run)}
"""


def _join(words: Sequence[str]) -> str:
    """As shlex.join, but that $HEAD stays a variable."""
    return " ".join(word if word.startswith("$HEAD") else shlex.quote(word) for word in words)
