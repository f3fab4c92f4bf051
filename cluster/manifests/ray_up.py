"""`ray up` on AWS and Google Cloud: a head on demand, and workers that Ray's own autoscaler starts and gives back.

Invariant: what a stage asks for finds its machine, as every node type has its resources and labels in the file (the
autoscaler hands both to `ray start`). Ray's token comes from a file of the user's machine that `ray up` copies.
"""

import json
import re
from typing import Any

from cluster.manifests.common import (
    ENV_FILE,
    HOLDS_STAGELINE,
    IDLE_S,
    PORT,
    Launch,
    instance,
    object_store,
    render,
    whole,
)
from cluster.manifests.common import shared_memory as shared_memory_of
from cluster.shape import MARKET, NodeParams
from modeling.errors import UserError

DISK_GB = 300
# Images with Ubuntu 22.04, and NVIDIA's driver where there are GPUs. AWS: resolved by EC2 itself when a machine starts.
AWS_IMAGE = {
    True: "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id",
    False: "resolve:ssm:/aws/service/canonical/ubuntu/server/22.04/stable/current/amd64/hvm/ebs-gp2/ami-id",
}
GCP_IMAGE = {
    True: "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570",
    False: "projects/ubuntu-os-cloud/global/images/family/ubuntu-2204-lts",
}
# Google's machines that bring GPUs, by the start of their names, and the GPUs that are added to an n1, by Ray's names.
GCP_WITH_GPUS = ("a2-", "a3-", "a4-", "a4x-", "g2-", "g4-")
GCP_ADDED = {
    "T4": "nvidia-tesla-t4", "V100": "nvidia-tesla-v100", "P100": "nvidia-tesla-p100", "P4": "nvidia-tesla-p4",
}  # fmt: skip
# What Ray's role for the head lacks (ray/autoscaler/_private/aws/config.py: AmazonEC2FullAccess, AmazonS3FullAccess):
# to give the role to workers, and to look up the image.
ROLE = "ray-autoscaler-v1"
POLICY = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": f"arn:aws:iam::*:role/{ROLE}"},
        {"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": "arn:aws:ssm:*::parameter/aws/service/*"},
    ],
}
# Ray gives the head this account of Google's, and makes it where it is missing (ray/autoscaler/_private/gcp/config.py:
# _configure_iam_role). It may not read the Artifact Registry; workers get no account.
ACCOUNT = "ray-autoscaler-sa-v1"
GCP_REGISTRY = re.compile(r"((?:[a-z0-9-]+-docker\.pkg\.dev|(?:[a-z0-9-]+\.)?gcr\.io))/")
HEAD = "head"
ENVIRONMENT = {
    "aws": f"set -a; . ~/{ENV_FILE}; set +a; unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN; "
    "export RAY_AUTH_MODE=token; ulimit -n 65536",
    "gcp": f"set -a; . ~/{ENV_FILE}; set +a; export RAY_AUTH_MODE=token; ulimit -n 65536",
}
DOCKER = [
    "command -v docker >/dev/null || curl -fsSL https://get.docker.com | sudo sh",
    "sudo usermod -aG docker $USER",
    "sleep 12",  # until the connection that knew nothing of the group is closed
]


def write(launch: Launch) -> dict[str, str]:
    """{file name: text}. Raises UserError where the section says too little for a cloud."""
    cluster = launch.cluster
    if cluster.provider is None:
        raise UserError("no 'provider', on which `ray up` could start machines", where=f"{launch.file}: cluster",
                        remedy="add 'provider: aws' or 'provider: gcp'")  # fmt: skip
    if HEAD in cluster.nodes:
        raise UserError(f"'{HEAD}' is the name of the head's own type", where=f"{launch.file}: cluster.nodes.{HEAD}",
                        remedy="give the workers another name")  # fmt: skip
    roles = {
        "aws": f"All machines have the role that the first `ray up` makes, {ROLE}, which may start machines and use\n"
        "S3. To start workers it needs the rights above, given once; without them none comes. Keys of AWS in\n"
        f"{ENV_FILE} are not used: the autoscaler on the head would start machines with them.",
        "gcp": f"S3 keys (HMAC keys of a bucket of Google's, with AWS_ENDPOINT_URL) belong into {ENV_FILE} too.",
    }
    rights = {
        "aws": f"""
  aws iam put-role-policy --role-name {ROLE} --policy-name stageline --policy-document \\
    '{json.dumps(POLICY)}'""",
        "gcp": "",
    }
    first, pulled = _image_rights(launch)
    comment = f"""{launch.name}: a cluster on {cluster.provider.upper()}.

{first}  (umask 077; echo "RAY_AUTH_TOKEN=$(openssl rand -hex 32)" > ~/{ENV_FILE})   # once
  ray up ray-up.yaml{rights[cluster.provider]}
  ray dashboard ray-up.yaml &                     # the head's port 8265 on this machine
  set -a; . ~/{ENV_FILE}; set +a
  {launch.submit}
  ray down ray-up.yaml

{roles[cluster.provider]}
The image has to hold Ray and Stageline (see the Dockerfile of the project).
{pulled}
"""
    return {"ray-up.yaml": render(comment, _config(launch))}


def _google_registry(launch: Launch) -> str:
    """The host of the image, where it is one of Google's and the machines are too; else ""."""
    found = GCP_REGISTRY.match(launch.image)
    return found[1] if found and launch.cluster.provider == "gcp" else ""


def _image_rights(launch: Launch) -> tuple[str, str]:
    """(commands before the first `ray up`, what is to be known of the image), for the comment."""
    libraries = "  pip install google-api-python-client google-auth-httplib2     # `ray up` imports them\n"
    first = libraries if launch.cluster.provider == "gcp" else ""
    if not _google_registry(launch):
        return first, (
            "Docker pulls the image before anything of this file could log in: it has to lie where it is read without\n"
            "a login. A private registry, Amazon's ECR among them, is no such place."
        )
    project = launch.cluster.project
    rights = f"""  gcloud iam service-accounts create {ACCOUNT} --project {project}   # once
  gcloud projects add-iam-policy-binding {project} --role roles/artifactregistry.reader \\
    --member serviceAccount:{_account(launch)}
"""
    return first + rights, (
        f"All machines have the account {ACCOUNT}, with which Docker, told by gcloud, pulls the image. Ray\n"
        "would make it in the first `ray up`, which already pulls: so it is made before."
    )


def _login(launch: Launch) -> list[str]:
    """On the host, before Docker pulls. An image that anybody may read is pulled without gcloud too."""
    host = _google_registry(launch)
    return [f"gcloud auth configure-docker {host} --quiet || true"] if host else []


def _account(launch: Launch) -> str:
    return f"{ACCOUNT}@{launch.cluster.project}.iam.gserviceaccount.com"


def _config(launch: Launch) -> dict[str, Any]:
    cluster, provider = launch.cluster, _provider(launch)
    assert cluster.provider is not None, "told by write()"
    environment = ENVIRONMENT[cluster.provider]
    types = {HEAD: _head(launch), **{name: _workers(launch, name, node) for name, node in launch.nodes.items()}}
    agent = f"python -m cluster.agent --address $RAY_HEAD_IP:{PORT} --source {cluster.provider}"
    return {
        "cluster_name": launch.slug(40),
        "max_workers": sum(node.max for node in launch.nodes.values()),
        "idle_timeout_minutes": IDLE_S // 60,
        "provider": provider,
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": launch.image,
            "container_name": "stageline",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536"],
        },
        "head_node_type": HEAD,
        "available_node_types": types,
        "file_mounts": {f"~/{ENV_FILE}": f"~/{ENV_FILE}"},
        "initialization_commands": [*DOCKER, *_login(launch)],
        "setup_commands": [*cluster.setup, HOLDS_STAGELINE],
        "head_start_ray_commands": [
            "ray stop",
            f"{environment}; ray start --head --port={PORT} --object-manager-port=8076 --metrics-export-port=8080 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{environment}; ray start --address=$RAY_HEAD_IP:{PORT} --object-manager-port=8076 "
            "--metrics-export-port=8080",
            f"{environment}; nohup setsid flock -n /tmp/notice-agent.lock {agent} > /tmp/notice-agent.log 2>&1 "
            "< /dev/null &",
        ],
    }


def _provider(launch: Launch) -> dict[str, Any]:
    cluster = launch.cluster
    needed = {"region": cluster.region}
    if cluster.provider == "gcp":
        needed |= {"zone": cluster.zone, "project": cluster.project}
    for field, value in needed.items():
        if value is None:
            raise UserError(f"no '{field}' of {cluster.provider}", where=f"{launch.file}: cluster",
                            remedy=f"add '{field}:'")  # fmt: skip
    provider: dict[str, Any] = {"type": cluster.provider, "region": cluster.region}
    if cluster.zone:
        provider["availability_zone"] = cluster.zone
    if cluster.provider == "gcp":
        return provider | {"project_id": cluster.project}
    return provider | {"cache_stopped_nodes": False}


def _head(launch: Launch) -> dict[str, Any]:
    return {
        "resources": {"CPU": 0, "GPU": 0},
        "labels": {MARKET: "on-demand"},
        "node_config": _machine(launch, instance(launch, ""), gpus=False, spot=False),
        "min_workers": 0,
        "max_workers": 0,
    }


def _workers(launch: Launch, name: str, node: NodeParams) -> dict[str, Any]:
    config = _machine(launch, instance(launch, name), bool(node.gpus), node.spot)
    if launch.cluster.provider == "aws":
        config["IamInstanceProfile"] = {"Name": ROLE}
    elif node.gpus:
        config |= _added_gpus(launch, name, node)
    if _google_registry(launch):  # as Ray's documents say ("Running workers with Service Accounts")
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        config["serviceAccounts"] = [{"email": _account(launch), "scopes": scopes}]
    return {
        "resources": {"CPU": whole(node.cpus), "GPU": node.gpus, "object_store_memory": object_store(node)},
        "labels": node.labels(name),
        "node_config": config,
        "docker": {"worker_run_options": [f"--shm-size={int(shared_memory_of(node) * 1024)}m"]},
        "min_workers": node.min,
        "max_workers": node.max,
    }


def _added_gpus(launch: Launch, name: str, node: NodeParams) -> dict[str, Any]:
    """Of Google's: empty for a machine that comes with its GPUs. Raises UserError for one that cannot have them."""
    machine = instance(launch, name)
    if machine.startswith(GCP_WITH_GPUS):
        return {}
    if machine.startswith("n1-") and node.accelerator in GCP_ADDED:
        return {"guestAccelerators": [
            {"acceleratorType": GCP_ADDED[node.accelerator], "acceleratorCount": node.gpus}
        ]}  # fmt: skip
    raise UserError(
        f"Google Cloud has no {machine} with {node.accelerator or 'GPUs of an unknown type'}",
        where=f"{launch.file}: cluster.nodes.{name}",
        remedy=f"take a machine that brings its GPUs ({', '.join(f'{start}*' for start in GCP_WITH_GPUS)}), "
        f"or n1-* with accelerator {', '.join(GCP_ADDED)}",
    )


def _machine(launch: Launch, name: str, gpus: bool, spot: bool) -> dict[str, Any]:
    """The request that the cloud takes: EC2's RunInstances, or Compute Engine's instances.insert."""
    if launch.cluster.provider == "aws":
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": DISK_GB, "VolumeType": "gp3"}}
        market = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
        return {"InstanceType": name, "ImageId": AWS_IMAGE[gpus], "BlockDeviceMappings": [disk], **market}
    start = {"diskSizeGb": DISK_GB, "sourceImage": GCP_IMAGE[gpus]}
    disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": start}
    scheduling: dict[str, Any] = {}
    if spot:
        scheduling = {"provisioningModel": "SPOT", "preemptible": True, "automaticRestart": False,
                      "instanceTerminationAction": "DELETE"}  # fmt: skip
    if gpus or spot:  # neither can be moved to another host
        scheduling["onHostMaintenance"] = "TERMINATE"
    return {"machineType": name, "disks": [disk], **({"scheduling": scheduling} if scheduling else {})}
