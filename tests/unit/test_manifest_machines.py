"""What manifests have machines do before there is a cluster: log in, check, start; and who is still there then."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.cli.main import main
from tests.unit.manifests import EXPERIMENTS, ROOT, documents, golden, small

# As /bin/sleep, but that it first notes who is below the script that waits.
SLEEP = """#!{python}
import json, psutil
below = [child.cmdline() for child in psutil.Process().parent().children(recursive=True)]
with open("{folder}/below.json", "w") as out:
    json.dump([line for line in below if "sleep" not in " ".join(line)], out)
"""


def files(name: str) -> dict[str, str]:
    """The manifests of an experiment as they are kept (test_manifests.py: what is written is the same)."""
    return {path.name: path.read_text() for path in golden(name).iterdir()}


def ray_up(cluster: str, image: str, folder: Path) -> tuple[str, dict]:
    """The text of ray-up.yaml, and what it says."""
    experiment = folder / "e.yaml"
    experiment.write_text(small("{}", cluster, image))
    assert main(["cluster", "manifests", str(experiment), "--target", "ray-up", "--output", str(folder)]) == 0
    text = (folder / "ray-up.yaml").read_text()
    return text, yaml.safe_load(text)


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_their_shell_scripts_are_bash(name):
    scripts = []
    for file, text in files(name).items():
        if file == "ray-up.yaml":
            config = yaml.safe_load(text)
            scripts += [line for key, lines in config.items() if key.endswith("_commands") for line in lines]
        if file == "skypilot.yaml":
            scripts += [yaml.safe_load(text)["setup"], yaml.safe_load(text)["run"]]
        if file == "raycluster.yaml":
            groups = documents(text)["RayCluster"]["spec"]["workerGroupSpecs"]
            hooks = [group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"] for group in groups]
            scripts += [hook["exec"]["command"][-1] for hook in hooks]
    assert scripts
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr, f"{script}\n{done.stderr}"


def test_the_experiment_reaches_the_cluster_as_it_is(tmp_path):
    original = (ROOT / "experiments/cluster_aws_1b.yaml").read_text()
    job = documents(files("cluster_aws_1b")["rayjob.yaml"])
    assert list(job["ConfigMap"]["data"].values()) == [original]
    setup = yaml.safe_load(files("cluster_aws_1b")["skypilot.yaml"])["setup"]
    environment = {"HOME": str(tmp_path), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", setup], check=True, env=environment, cwd=ROOT)
    assert (tmp_path / "experiment.yaml").read_text() == original


def setup_commands() -> list[str]:
    config = yaml.safe_load(files("cluster_gcp_8b")["ray-up.yaml"])
    return [*config["setup_commands"], yaml.safe_load(files("cluster_quickstart")["skypilot.yaml"])["setup"]]


@pytest.mark.parametrize("script", setup_commands(), ids=["ray-up", "skypilot"])
def test_an_image_without_stageline_ends_the_setup(script, tmp_path):
    """The agent goes to the background, where nobody would see that it did not start."""
    executable(tmp_path / "python", "#!/bin/sh\necho \"No module named 'cluster'\" >&2; exit 1\n")
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "no Stageline in this image" in done.stderr


AWS = "{provider: aws, region: r, head: {instance: x}, nodes: {a: {cpus: 8, instance: x}}}"
GCP = "{provider: gcp, region: r, zone: z, project: p, head: {instance: n2}, nodes: {a: {cpus: 8, instance: n2}}}"


@pytest.mark.parametrize(
    "image, host",
    [
        ("us-docker.pkg.dev/p/r/stageline:1", "us-docker.pkg.dev"),
        ("europe-west4-docker.pkg.dev/p/r/stageline:1", "europe-west4-docker.pkg.dev"),
        ("eu.gcr.io/p/stageline:1", "eu.gcr.io"),
        ("gcr.io/p/stageline:1", "gcr.io"),
        ("ghcr.io/me/stageline:1", None),
        ("me/gcr.io/stageline:1", None),
    ],
)
def test_machines_of_googles_may_read_its_registries(image, host, tmp_path):
    """Ray gives the head alone an account, and pulls before anything but the initialization commands has run."""
    text, config = ray_up(GCP, image, tmp_path)
    source = Path(str(find_spec("ray.autoscaler._private.gcp.config").origin)).read_text()  # type: ignore[union-attr]
    ray, version = (re.findall(rf'^{name} = "(.*)"$', source, re.M)[0] for name in ("RAY", "VERSION"))
    account = f"{ray}-sa-{version}@p.iam.gserviceaccount.com"
    accounts = [{"email": account, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}]
    logins = [line for line in config["initialization_commands"] if "gcloud" in line]
    assert logins == ([f"gcloud auth configure-docker {host} --quiet || true"] if host else [])
    worker = config["available_node_types"]["a"]["node_config"]
    assert worker.get("serviceAccounts") == (accounts if host else None)
    assert (f"--member serviceAccount:{account}" in text) == bool(host)
    assert ("Amazon's ECR among them" in text) == (host is None)


@pytest.mark.parametrize(
    "machine, says",
    [
        ("instance: n1-standard-16, gpus: 2, accelerator: T4", None),
        ("instance: g2-standard-24, gpus: 2, accelerator: L4", None),
        ("instance: n1-standard-16, gpus: 2, accelerator: L4", r"nodes\.a: Google Cloud has no n1-standard-16 with L4"),
        ("instance: n1-standard-16, gpus: 2", r"no n1-standard-16 with GPUs of an unknown type"),
        ("instance: n2-standard-16, gpus: 2, accelerator: T4", r"no n2-standard-16 with T4 → take a machine that"),
    ],
)
def test_a_machine_of_googles_has_its_gpus(machine, says, tmp_path, capsys):
    """An n1 has those that are asked for beside it; without that the autoscaler would wait for GPUs for ever."""
    cluster = f"""{{provider: gcp, region: r, zone: us-central1-a, project: p, head: {{instance: n2-standard-8}},
      nodes: {{a: {{{machine}, cpus: 16}}}}}}"""
    experiment = tmp_path / "e.yaml"
    experiment.write_text(small("{}", cluster))
    code = main(["cluster", "manifests", str(experiment), "--target", "ray-up", "--output", str(tmp_path)])
    if says:
        assert code == 2 and re.search(says, capsys.readouterr().err)
        return
    assert code == 0
    asked = yaml.safe_load((tmp_path / "ray-up.yaml").read_text())["available_node_types"]["a"]["node_config"]
    added = {"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 2}
    assert asked.get("guestAccelerators") == ([added] if "n1-" in machine else None)
    assert asked["scheduling"]["onHostMaintenance"] == "TERMINATE"


def test_of_another_registry_it_is_said_that_nothing_logs_in(tmp_path):
    text, config = ray_up(AWS, "1234.dkr.ecr.us-east-1.amazonaws.com/stageline:1", tmp_path)
    assert "it has to lie where it is read without a login" in " ".join(re.sub("^#", "", text, flags=re.M).split())
    assert not [line for line in config["initialization_commands"] if "login" in line]


def test_ray_and_the_agent_outlive_the_script_of_a_machine_of_skypilots(tmp_path):
    """SkyPilot kills what it saw below a script when that has ended (its subprocess_daemon.py looks every second)."""
    run = yaml.safe_load(files("cluster_quickstart")["skypilot.yaml"])["run"].replace("/tmp/", f"{tmp_path}/")
    agent = tmp_path / "agent"  # its pid
    executable(tmp_path / "ray", f'#!/bin/sh\necho "$@" >> {tmp_path}/ray.txt\n')
    executable(tmp_path / "python", f"#!/bin/sh\necho $$ > {agent}\nexec tail -f /dev/null\n")
    executable(tmp_path / "sleep", SLEEP.format(python=sys.executable, folder=tmp_path))
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    try:
        subprocess.run(["bash", "-c", run], env=environment, check=True, timeout=60)
        until = time.monotonic() + 30
        while not (agent.exists() and agent.read_text().endswith("\n")):
            assert time.monotonic() < until, "no agent was started"
            time.sleep(0.02)
        assert json.loads((tmp_path / "below.json").read_text()) == []
        assert psutil.Process(int(agent.read_text())).is_running()
    finally:
        psutil.Process(int(agent.read_text())).kill()
    _, start = (tmp_path / "ray.txt").read_text().splitlines()
    assert start.startswith("start --address=10.0.0.1:6379 ") and "--dashboard-agent-listen-port=52366" in start
