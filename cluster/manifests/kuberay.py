"""KubeRay: a RayJob that runs the experiment, and a RayCluster to which `stageline submit` sends it.

Invariant: the head is never on a spot machine and has no CPUs for Ray's work; a worker's pod has time to save between
the kubelet's SIGTERM and its end. All containers of a pod get that signal at once: the agent (a sidecar) has Ray drain
the node, while a preStop hook keeps Ray's own container from being told before its raylet has gone.

Read in KubeRay 1.6 (ray-operator/controllers/ray/common/pod.go): `labels` of a group become `ray start --labels` and
are what the autoscaler goes by; only the first container of a pod gets the operator's variables and token, so the
sidecar names them itself; the head's service is the cluster's name with "-head-svc", cut to 50 characters. A RayJob's
`metadata` and `runtimeEnvYAML` go into the request to Ray's Jobs API as they are; without a `jobId` each attempt has an
id of its own, which the driver reads from Ray.
"""

import shlex
from typing import Any

import yaml

from cluster import driverjob
from cluster.manifests.common import FILE, IDLE_S, PORT, Launch, object_store, render, shared_memory, whole
from cluster.shape import MARKET, HeadParams, NodeParams

RAY_VERSION = "2.60.0"
FOLDER = "/etc/stageline"  # of the experiment, on the head
NAME_LENGTH = 35  # with a RayJob's suffix of six and "-head-svc" it stays below 50
AGENT = {"cpu": 0.1, "memory": 0.5}  # cores and GB of the sidecar
AUTOSCALER = {"cpu": 0.5, "memory": 0.5}  # of the one that KubeRay adds to the head
# The labels by which nodes are known to be spot machines, with their values; taints have the same keys.
SPOT = {
    "aws": {"eks.amazonaws.com/capacityType": "SPOT", "karpenter.sh/capacity-type": "spot"},
    "gcp": {"cloud.google.com/gke-spot": "true"},
}
RAYLET_GONE = "while grep -qx raylet /proc/[0-9]*/comm 2>/dev/null; do sleep 1; done"


def write(launch: Launch) -> dict[str, str]:
    """{file name: text}."""
    name, secret = launch.slug(NAME_LENGTH), launch.cluster.secret
    needs = f"""
Needs KubeRay 1.6 or newer, and the secret '{secret}' in the same namespace. Its entries are the environment of all
nodes (S3 keys); auth_token is Ray's token:

  kubectl create secret generic {secret} --from-literal=auth_token="$(openssl rand -hex 32)" \\
      --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...

The image has to hold Ray {RAY_VERSION} and Stageline (see the Dockerfile of the project).
A pod has {launch.cluster.grace:g} s to end (cluster.grace); a spot node of GKE gives 15 s, whatever is written here.
"""
    job = f"""{name}: cluster, driver and experiment in one, by `kubectl apply -f rayjob.yaml`.
The cluster goes when the job has ended. backoffLimit starts it anew where the head was lost; two attempts may overlap
(KubeRay issue 5211), which the ledger in storage fences: the older one commits nothing any more.
Its driver is a Ray job like any that was submitted. With RAY_AUTH_TOKEN as in raycluster.yaml, and the head's port:

  kubectl port-forward "$(kubectl get service -o name | grep {name}-.*-head-svc)" 8265 &
  stageline list; stageline logs JOB -f; stageline cancel JOB    # saves first: `kubectl delete` may leave no time to
{needs}"""
    cluster = f"""{name}: a cluster that stays, by `kubectl apply -f raycluster.yaml`. Then:

  kubectl port-forward service/{name}-head-svc 8265 &
  export RAY_AUTH_TOKEN="$(kubectl get secret {secret} -o jsonpath='{{.data.auth_token}}' | base64 -d)"
  {launch.submit}
{needs}"""
    spec, job_spec = _cluster(launch), _cluster(launch, experiment=f"{name}-experiment")
    return {
        "rayjob.yaml": render(job, *_job(launch, name, job_spec)),
        "raycluster.yaml": render(cluster, _resource("RayCluster", name, spec)),
    }


def _resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _job(launch: Launch, name: str, cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The experiment as a ConfigMap, and the RayJob."""
    metadata = {"name": f"{name}-experiment"}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {FILE: launch.text}}
    run = ["stageline", "run", f"{FOLDER}/{FILE}", *launch.overrides, "--address", "auto"]
    spec = {
        "entrypoint": shlex.join(run),
        "metadata": driverjob.metadata(launch.name, launch.storage),
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": driverjob.environment()}),
        "submissionMode": "HTTPMode",  # by the operator: no pod more that could be on a spot machine
        "backoffLimit": 2,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": IDLE_S,
        "rayClusterSpec": cluster,
    }
    return [config, _resource("RayJob", name, spec)]


def _cluster(launch: Launch, experiment: str = "") -> dict[str, Any]:
    """A RayClusterSpec. experiment: the ConfigMap that the head mounts."""
    cluster = launch.cluster
    spec: dict[str, Any] = {"rayVersion": RAY_VERSION, "authOptions": {"mode": "token", "secretName": cluster.secret}}
    if any(node.max > node.min for node in launch.nodes.values()):
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": IDLE_S}
    spec["headGroupSpec"] = _head(launch, experiment)
    spec["workerGroupSpecs"] = [_workers(launch, name, node) for name, node in launch.nodes.items()]
    return spec


def _head(launch: Launch, experiment: str) -> dict[str, Any]:
    head = launch.cluster.head
    ports = [{"containerPort": PORT, "name": "gcs"}, {"containerPort": 8265, "name": "dashboard"}]
    container: dict[str, Any] = {**_container(launch, "ray-head"), "ports": ports, "resources": _room(head, AUTOSCALER)}
    pod: dict[str, Any] = {"containers": [container], **_placed(launch, head.instance, spot=False)}
    if experiment:
        container["volumeMounts"] = [{"name": "experiment", "mountPath": FOLDER, "readOnly": True}]
        pod["volumes"] = [{"name": "experiment", "configMap": {"name": experiment}}]
    params = {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"}
    return {"rayStartParams": params, "labels": {MARKET: "on-demand"}, "template": {"spec": pod}}


def _workers(launch: Launch, name: str, node: NodeParams) -> dict[str, Any]:
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _gi(shared_memory(node))}}
    container = {
        **_container(launch, "ray-worker"),
        "resources": _room(node, AGENT),
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", RAYLET_GONE]}}},
    }
    pod = {
        "containers": [container, _agent(launch)],
        "volumes": [memory],
        "restartPolicy": "Never",  # a drained raylet that is started again would take work on a machine that goes
        "terminationGracePeriodSeconds": round(launch.cluster.grace),
        **_placed(launch, node.instance, node.spot, gpus=node.gpus),
    }
    params = {"num-cpus": str(whole(node.cpus)), "object-store-memory": str(object_store(node))}
    counts = {"replicas": node.min, "minReplicas": node.min, "maxReplicas": node.max}
    return {
        "groupName": name, **counts, "rayStartParams": params, "labels": node.labels(name), "template": {"spec": pod},
    }  # fmt: skip


def _container(launch: Launch, name: str) -> dict[str, Any]:
    return {"name": name, "image": launch.image, "envFrom": [{"secretRef": {"name": launch.cluster.secret}}]}


def _agent(launch: Launch) -> dict[str, Any]:
    """The notice agent beside Ray: same pod, same address, so it finds its node."""
    cluster = launch.cluster
    label = {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}}
    token = {"secretKeyRef": {"name": cluster.secret, "key": "auth_token"}}
    command = ["python", "-m", "cluster.agent", "--address", f"$(RAY_CLUSTER_NAME)-head-svc:{PORT}"]
    command += ["--source", cluster.provider or "auto", "--on-sigterm", f"{cluster.grace:g}"]
    return {
        "name": "notice-agent",
        "image": launch.image,
        "command": command,
        "env": [
            {"name": "RAY_CLUSTER_NAME", "valueFrom": label},
            {"name": "RAY_AUTH_MODE", "value": "token"},
            {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
        ],
        "resources": _limits(AGENT["cpu"], AGENT["memory"]),
    }


def _placed(launch: Launch, instance: str | None, spot: bool, gpus: int = 0) -> dict[str, Any]:
    """Where a pod may run: on machines of its type and market, whose taints it tolerates."""
    clouds = [launch.cluster.provider] if launch.cluster.provider else list(SPOT)
    marks = {key: value for cloud in clouds for key, value in SPOT[cloud].items()}
    if spot:  # terms are alternatives
        terms = [{"matchExpressions": [_expression(key, "In", value)]} for key, value in marks.items()]
    else:  # true of nodes without the label too
        terms = [{"matchExpressions": [_expression(key, "NotIn", value) for key, value in marks.items()]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    tolerated = [*(marks if spot else ()), *(["nvidia.com/gpu"] if gpus else [])]
    placed: dict[str, Any] = {"affinity": {"nodeAffinity": required}}
    if instance:
        placed["nodeSelector"] = {"node.kubernetes.io/instance-type": instance}
    if tolerated:
        placed["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in tolerated]
    return placed


def _expression(key: str, operator: str, value: str) -> dict[str, Any]:
    return {"key": key, "operator": operator, "values": [value]}


def _room(machine: NodeParams | HeadParams, beside: dict[str, float]) -> dict[str, Any]:
    """What is left of a machine for Ray's container, beside another. The kubelet keeps a part (here by GKE's published
    rule, "Plan GKE Standard node sizes", more than EKS keeps), the cluster's own pods about half a core and a GB."""
    memory = machine.memory - _share(machine.memory, (4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06), (1e9, 0.02)) - 1.1
    cpus = machine.cpus - _share(machine.cpus, (1, 0.06), (1, 0.01), (2, 0.005), (1e9, 0.0025)) - 0.5
    memory, cpus = memory - beside["memory"], cpus - beside["cpu"]
    return _limits(max(0.1, cpus), max(0.5, memory), getattr(machine, "gpus", 0))


def _share(amount: float, *steps: tuple[float, float]) -> float:
    """Of the first `width` of the amount `rate`, of the next ... : as income tax goes."""
    total = 0.0
    for width, rate in steps:
        total += min(amount, width) * rate
        amount = max(0.0, amount - width)
    return total


def _limits(cpus: float, memory: float, gpus: int = 0) -> dict[str, Any]:
    """Requests and limits alike, but for cores, which may be used where nobody else does."""
    held: dict[str, Any] = {"memory": _gi(memory), **({"nvidia.com/gpu": gpus} if gpus else {})}
    return {"requests": {"cpu": f"{int(cpus * 1000)}m", **held}, "limits": held}


def _gi(gigabytes: float) -> str:
    return f"{int(gigabytes * 1024)}Mi"
