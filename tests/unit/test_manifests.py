"""`stageline cluster manifests`: files that are what they were, that their readers take, and that hold no secret."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import yaml

from orchestrator.cli.main import main
from tests.unit.manifests import EXPERIMENTS, FILES, ROOT, documents, golden, is_writing, kuberay, small, write_all


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, dict[str, str]]:
    return {name: write_all(name, tmp_path_factory.mktemp(name)) for name in EXPERIMENTS}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_manifests_are_as_they_were(name, written):
    files = written[name]
    assert set(files) == {file for target in EXPERIMENTS[name] for file in FILES[target]}
    if is_writing():
        golden(name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (golden(name) / file).write_text(text)
    assert {path.name: path.read_text() for path in golden(name).iterdir()} == files


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_kuberay_takes_them(name, kind, written):
    kuberay(kind).validate(documents(written[name][f"{kind.lower()}.yaml"])[kind])


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "headGroupSpec", "template", "spec", "nodeSelectr"), {}),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 1, "environment"), []),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriodSeconds"), "120"),
        (("spec", "authOptions", "secret"), "stageline"),
    ],
)
def test_a_field_that_kuberay_would_drop_is_seen(path, value, written):
    import jsonschema

    found = documents(written["cluster_aws_1b"]["raycluster.yaml"])["RayCluster"]
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=str(path[-1]) if value != "120" else "120"):
        kuberay("RayCluster").validate(found)


def test_rays_autoscaler_on_kubernetes_sees_what_the_experiment_says(written):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = documents(written["cluster_gcp_8b"]["raycluster.yaml"])["RayCluster"]
    cluster["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    gpus = {"CPU": 208, "GPU": 8}
    found = {name: {what: its["resources"].get(what, 0) for what in gpus} for name, its in types.items()}
    head = next(name for name in found if "head" in name)
    assert found.pop(head) == {"CPU": 0, "GPU": 0}
    assert found == {"h100": gpus, "h100-spot": gpus, "cpu": {"CPU": 64, "GPU": 0}}
    limits = {name: (its["min_workers"], its["max_workers"]) for name, its in types.items() if name != head}
    assert limits == {"h100": (2, 2), "h100-spot": (0, 6), "cpu": (0, 4)}
    assert types["h100-spot"]["labels"] == {
        "stageline.io/node-type": "h100-spot",
        "ray.io/market-type": "spot",
        "ray.io/accelerator-type": "H100",
    }


def test_ray_takes_the_labels_of_a_machine_of_skypilots(written):
    from ray._private.label_utils import parse_node_labels_string

    run = yaml.safe_load(written["cluster_aws_1b"]["skypilot.yaml"])["run"]
    option = re.search(r"--labels=(\S+)", run)
    assert option and parse_node_labels_string(option[1])["ray.io/market-type"] == "spot"


@pytest.mark.parametrize("name", [name for name, targets in EXPERIMENTS.items() if "ray-up" in targets])
def test_ray_up_takes_them(name, written):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(written[name]["ray-up.yaml"]))
    validate_config(config)
    assert config["available_node_types"][config["head_node_type"]]["max_workers"] == 0
    assert "ray-3.0.0" not in str(config), "Ray's defaults would install a nightly build"


def test_ec2_takes_the_machines_that_ray_asks_it_for(written):
    import botocore.session
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.aws.config import DEFAULT_RAY_IAM_ROLE, DEFAULT_RAY_INSTANCE_PROFILE

    request = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in yaml.safe_load(written["cluster_aws_1b"]["ray-up.yaml"])["available_node_types"].items():
        asked = node["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, request).has_errors()
        unknown = set(asked) - set(request.members)
        assert not unknown, unknown
        assert asked.get("InstanceMarketOptions", {}).get("MarketType") == ("spot" if name != "head" else None)
        if name != "head":
            assert asked["IamInstanceProfile"] == {"Name": DEFAULT_RAY_INSTANCE_PROFILE}
    command = re.search(r"#( *aws iam put-role-policy .*\\)\n#(.*)", written["cluster_aws_1b"]["ray-up.yaml"])
    assert command, "Ray's role may neither give itself to a worker nor look an image up"
    shell = f'aws() {{ printf "%s\\n" "$@"; }}\n{command[1]}\n{command[2]}'
    *_, role, _, _, _, policy = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert role == DEFAULT_RAY_IAM_ROLE
    allowed = {its["Action"]: its["Resource"] for its in json.loads(policy)["Statement"] if its["Effect"] == "Allow"}
    assert allowed["iam:PassRole"].endswith(f":role/{DEFAULT_RAY_IAM_ROLE}")
    assert "/aws/service/" in asked["ImageId"] and "parameter/aws/service/*" in allowed["ssm:GetParameters"]


def test_a_worker_pod_has_time_to_save_and_an_agent_that_finds_the_head(written):
    spec = documents(written["cluster_gcp_8b"]["raycluster.yaml"])["RayCluster"]["spec"]
    name = documents(written["cluster_gcp_8b"]["raycluster.yaml"])["RayCluster"]["metadata"]["name"]
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        ray, agent = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] == 15 and pod["restartPolicy"] == "Never"
        assert "preStop" in ray["lifecycle"] and "lifecycle" not in agent
        assert agent["command"][-2:] == ["--on-sigterm", "15"]
        assert f"$(RAY_CLUSTER_NAME)-head-svc:{6379}" in agent["command"] and len(f"{name}-head-svc") + 6 <= 50
        assert ray["resources"]["limits"].get("nvidia.com/gpu", 0) == (0 if group["groupName"] == "cpu" else 8)
        keys = [toleration["key"] for toleration in pod.get("tolerations", ())]
        assert ("cloud.google.com/gke-spot" in keys) == (group["labels"]["ray.io/market-type"] == "spot")


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("image", ["", "image: null, ", 'image: "", '])
def test_a_cluster_without_an_image_is_refused(image, target, tmp_path, capsys):
    """Ray's own images hold no Stageline: the driver and every notice agent would fail, most of them unseen."""
    experiment = tmp_path / "e.yaml"
    text = small("{}", "{provider: aws, region: r, head: {instance: x}, nodes: {a: {cpus: 8, instance: x}}}")
    experiment.write_text(text.replace("image: registry/it:1, ", image))
    assert main(["cluster", "manifests", str(experiment), "--target", target, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert re.search(r"e\.yaml: cluster: no 'image'.* → run `docker build -t", err) and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[], ["--shared-folders"], ["stages.mlp_warmup.lr=1e-4", "--shared-folders"]])
def test_the_command_in_the_comment_submits_what_the_manifest_was_written_for(given, tmp_path):
    experiment = tmp_path / "e.yaml"
    experiment.write_text(
        small("{}", "{provider: aws, region: r, head: {instance: x}, nodes: {a: {cpus: 8, instance: x}}}")
    )
    assert main(["cluster", "manifests", str(experiment), *given, "--output", str(tmp_path / "out")]) == 0
    for file in ("raycluster.yaml", "ray-up.yaml"):
        (command,) = re.findall(r"^# +stageline (submit .*)$", (tmp_path / "out" / file).read_text(), re.M)
        words = command.split()
        assert words[:2] == ["submit", "e.yaml"]
        assert set(words[2:]) == {"--address", "http://127.0.0.1:8265", *given}


def test_overrides_are_run_too(tmp_path, capsys):
    experiment = str(ROOT / "experiments/cluster_quickstart.yaml")
    options = ["stages.full_finetune.lr=2e-3", "cluster.nodes.small.max=5", "--target", "kuberay"]
    assert main(["cluster", "manifests", experiment, *options, "--output", str(tmp_path)]) == 0
    spec = documents((tmp_path / "rayjob.yaml").read_text())["RayJob"]["spec"]
    assert spec["entrypoint"] == (
        "stageline run /etc/stageline/experiment.yaml stages.full_finetune.lr=2e-3 cluster.nodes.small.max=5 "
        "--address auto"
    )
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raycluster.yaml", "rayjob.yaml"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "rayjob.yaml"), str(tmp_path / "raycluster.yaml")]


def test_a_driver_of_kuberays_is_given_what_submit_gives_one(written, monkeypatch):
    """Time to save before it is killed, and what list and cancel know it by."""
    from orchestrator.jobs import Jobs
    from orchestrator.spec import load_spec

    asked = {}
    jobs = object.__new__(Jobs)
    jobs.address = "http://127.0.0.1:8265"
    jobs._client = SimpleNamespace(submit_job=lambda **request: asked.update(request))  # pyright: ignore
    jobs.submit(load_spec(str(ROOT / "experiments/cluster_aws_1b.yaml"), []), [], None, grace=0.0)
    spec = documents(written["cluster_aws_1b"]["rayjob.yaml"])["RayJob"]["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert environment == {"env_vars": asked["runtime_env"]["env_vars"]}
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600
    assert all(isinstance(value, str) for value in environment["env_vars"].values()), "Ray takes nothing else"
    del asked["metadata"]["settings"]  # `submit` compares it: a job without one counts as the same
    assert spec["metadata"] == asked["metadata"]
    assert spec["metadata"]["storage"] == "s3://your-bucket/stageline"
    assert "--job" not in spec["entrypoint"] and "jobId" not in spec, "each attempt has an id of its own"


def test_no_secret_of_the_environment_is_in_a_file(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "planted-secret")
    for text in write_all("cluster_aws_1b", tmp_path).values():
        assert "planted-secret" not in text
        assert str(ROOT) not in text and not re.search(r"/(home|root)/(?!ray)", text)


@pytest.mark.parametrize(
    "old, new",
    [
        ("s3://bucket/some.json", "s3://me:planted@bucket/some.json"),
        ("name: small", "name: small  # was at https://me:planted@host/"),
        ("{cpus: 8}}", "{cpus: 8}}, setup: ['export HF_TOKEN=planted']"),
        ("{cpus: 8}}", "{cpus: 8}}, setup: ['hf auth login --token planted']"),
        ("name: small", "name: small  # hf_plantedplantedplantedplanted"),
        ("name: small", "# AKIAPLANTEDPLANTED12\nname: small"),
        ("name: small", "# -----BEGIN PRIVATE KEY-----\n# planted\n# -----END PRIVATE KEY-----\nname: small"),
        ("name: small", "# from https://host/x?X-Amz-Signature=planted&a=b\nname: small"),
        ("name: small", "name: small  # it is planted-0123"),
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(old, new, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_DB_PASSWORD", "planted-0123")
    text = small("{}", "{nodes: {a: {cpus: 8}}}")
    experiment = tmp_path / "e.yaml"
    experiment.write_text(text.replace(old, new))
    assert main(["cluster", "manifests", str(experiment), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert re.search(r"e\.yaml:\d+: .*holds (a|the value)", err) and "planted" not in err.lower()
    assert not (tmp_path / "out").exists()


def test_commands_that_take_a_key_from_where_it_is_are_none(tmp_path):
    setup = """['hf auth login --token "$HF_TOKEN"', 'docker login --password-stdin < key', 'export A_TOKEN=$(cat key)',
      'get --token-file key --max-tokens 5']"""
    text = small("{}", f"{{nodes: {{a: {{cpus: 8}}}}, setup: {setup}}}")
    experiment = tmp_path / "e.yaml"
    experiment.write_text(text)
    assert main(["cluster", "manifests", str(experiment), "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/stageline", "x" * 300])
@pytest.mark.parametrize("verb", ["manifests", "monitoring"])
def test_a_place_that_cannot_be_written_is_told(verb, output, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    experiment = [str(ROOT / "experiments/cluster_quickstart.yaml"), "--shared-folders"] if verb == "manifests" else []
    assert main(["cluster", verb, *experiment, "--output", str(tmp_path / output)]) == 2
    err = capsys.readouterr().err
    assert re.search(r"--output .*: cannot be written: .*→", err) and len(err.splitlines()) == 1, err


ONE_GPU = "{workers: 2, gpus: 1}"


@pytest.mark.parametrize(
    "resources, cluster, target, says",
    [
        ("{}", "null", "kuberay", r"no 'cluster:' section → add 'cluster:'"),
        (ONE_GPU, "{nodes: {a: {cpus: 8}}}", "kuberay",
         r"stages\.mlp_warmup: asks for 2 workers × \(1 CPU, 1 GPU\), .* at most 1 × \(8 CPU, on-demand, a\)"),
        ("{gpus: 1, accelerator: H100}", "{nodes: {a: {cpus: 8, gpus: 1, accelerator: L4}}}", "kuberay",
         r"mlp_warmup: asks for 1 worker × .*accelerator-type=H100, .* 1 × \(8 CPU, 1 GPU, L4, on-demand, a\)"),
        ("{workers: 9}", "{nodes: {a: {cpus: 8}}}", "kuberay", r"mlp_warmup: asks for 9 workers × \(1 CPU\)"),
        ("{labels: {ray.io/market-type: spot}}", "{nodes: {a: {cpus: 8}}}", "kuberay", r"market-type=spot, and the"),
        ("{}", "{nodes: {a: {cpus: 8, min: 3, max: 2}}}", "kuberay", r"nodes\.a: min 3 is more than max 2"),
        ("{}", "{nodes: {a: {cpus: 8, gpus: 1}}}", "kuberay", r"nodes\.a: has 1 GPUs of an unknown type"),
        ("{}", "{nodes: {A_1: {cpus: 8}}}", "kuberay", r"'A_1' cannot name machines of a cloud"),
        ("{}", "{nodes: {a: {cpus: 8}}, head: {spot: true}}", "kuberay", r"cluster\.head: unknown key 'spot'"),
        ("{}", "{nodes: {a: {cpus: 8}}}", "ray-up", r"no 'provider'"),
        ("{}", "{provider: aws, nodes: {a: {cpus: 8, instance: x}}}", "ray-up", r"no 'region' of aws"),
        ("{}", "{provider: aws, region: r, nodes: {a: {cpus: 8}}}", "ray-up", r"cluster\.head: no 'instance'"),
        ("{}", "{provider: gcp, region: r, zone: z, nodes: {a: {cpus: 8}}}", "ray-up", r"no 'project' of gcp"),
        ("{labels: {stageline.io/node-type: b}}", "{nodes: {a: {cpus: 1}, b: {cpus: 1}, c: {cpus: 0.5}}}", "skypilot",
         None),
        ("{gpus: 1}", "{nodes: {a: {cpus: 1}, b: {cpus: 0.5, gpus: 1, accelerator: L4}}}", "skypilot", r"stages\.mlp"),
        ("{cpus: 4, labels: {stageline.io/node-type: b}}", "{nodes: {a: {cpus: 8}, b: {cpus: 4}}}", "skypilot", None),
    ],
)  # fmt: skip
def test_what_no_cluster_could_run_is_refused_in_one_message(resources, cluster, target, says, tmp_path, capsys):
    experiment = tmp_path / "e.yaml"
    experiment.write_text(small(resources, cluster))
    code = main(["cluster", "manifests", str(experiment), "--target", target, "--output", str(tmp_path / "out")])
    err = capsys.readouterr().err
    if says is None:
        assert code == 0, err
        return
    assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(says, err), err
    assert not (tmp_path / "out").exists()


def test_skypilot_is_refused_where_stages_need_different_machines(tmp_path, capsys):
    text = small("{gpus: 1}", "{nodes: {big: {cpus: 32}, gpu: {cpus: 8, gpus: 1, accelerator: L4}}}")
    experiment = tmp_path / "e.yaml"
    experiment.write_text(
        text.replace("{kind: prepare, data: some}", "{kind: prepare, data: some, resources: {cpus: 32}}")
    )
    arguments = ["cluster", "manifests", str(experiment), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--target", "skypilot"]) == 2
    assert "no type serves all stages: some_data asks for 1 worker × (32 CPU)" in capsys.readouterr().err
    assert main(arguments) == 0, "without --target it is left out, and said to be"
    assert "skypilot left out: " in capsys.readouterr().out


def test_folders_of_this_machine_are_refused(tmp_path, capsys):
    experiment = tmp_path / "e.yaml"
    text = small("{}", "{nodes: {a: {cpus: 8}}}")
    arguments = ["cluster", "manifests", str(experiment), "--target", "kuberay", "--output", str(tmp_path / "out")]

    experiment.write_text(text.replace("s3://bucket/some.json", "data/some.json"))
    assert main(arguments) == 2
    assert f"data.some.meta: {tmp_path}/data/some.json → put them on S3" in capsys.readouterr().err
    assert main([*arguments, "--shared-folders"]) == 2
    assert "relative to its own place" in capsys.readouterr().err

    experiment.write_text(text.replace("s3://bucket/some.json", "/mnt/some.json"))
    assert main(arguments) == 2
    assert "data.some.meta: /mnt/some.json" in capsys.readouterr().err
    assert main([*arguments, "--shared-folders"]) == 0
