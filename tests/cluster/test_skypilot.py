"""The golden SkyPilot tasks are what SkyPilot's own loader reads: machines, market, secrets to be given, recovery."""

import json
from pathlib import Path

import yaml
from skypilot_env import skypilot  # noqa: F401 (a fixture)

GOLDEN = Path(__file__).parents[1] / "data/manifests"
LOAD = """
import json, sys, sky
task = sky.Task.from_yaml_config(json.loads(sys.argv[1]), secrets_overrides=[(n, "x") for n in sys.argv[2:]])
resources = [
    {"cloud": str(one.cloud), "region": one.region, "spot": one.use_spot, "accelerators": one.accelerators,
     "instance": one.instance_type, "cpus": one.cpus, "recovery": one.job_recovery}
    for one in task.resources
]
print("TASK " + json.dumps({"nodes": task.num_nodes, "resources": resources, "secrets": sorted(task.secrets)}))
"""
SECRETS = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"]
RECOVERY = {"strategy": "FAILOVER", "max_restarts_on_errors": 2}


def _task(name: str) -> dict:
    return yaml.safe_load((GOLDEN / name / "skypilot.yaml").read_text())


def _read(skypilot, task: dict) -> dict:  # noqa: F811
    done = skypilot(LOAD, json.dumps(task), *SECRETS)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TASK "))[5:])


def test_skypilot_reads_the_task_on_spot_machines(skypilot):  # noqa: F811
    machine = {"cloud": "AWS", "region": "us-east-1", "spot": True, "accelerators": {"H100": 8}}
    machine |= {"instance": "p5.48xlarge", "cpus": "192.0", "recovery": RECOVERY}
    assert _read(skypilot, _task("cluster_aws_1b")) == {"nodes": 8, "resources": [machine], "secrets": SECRETS}


def test_skypilot_reads_the_task_without_a_cloud(skypilot):  # noqa: F811
    machine = {"cloud": "None", "region": None, "spot": False, "accelerators": None}
    machine |= {"instance": None, "cpus": "4+", "recovery": RECOVERY}
    assert _read(skypilot, _task("cluster_quickstart")) == {"nodes": 3, "resources": [machine], "secrets": SECRETS}


def test_skypilot_refuses_what_it_does_not_know(skypilot):  # noqa: F811
    task = _task("cluster_aws_1b")
    for wrong in (task | {"num_node": 8}, task | {"resources": task["resources"] | {"spot": True}}):
        done = skypilot(LOAD, json.dumps(wrong), *SECRETS)
        assert done.returncode != 0 and ("num_node" in done.stderr or "spot" in done.stderr), done.stderr
