"""What deploy/ holds is valid, names nothing that does not exist, and is closed to strangers."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import ipaddress
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.kuberay_schema import SCHEMAS

import mmref
from mmref.cluster.resources import needed_cpus
from mmref.config import Config, load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES_VERSION = "1.31"  # the oldest that is checked
RAY_FILES = ["rayjob", "raycluster"]
LAUNCHER_FILES = ["aws", "local"]
INSTALLED = "/opt/mmref"  # where the image has the repository


def kuberay(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay" / f"{name}.yaml").read_text())


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "launcher" / f"{name}.yaml").read_text())


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"]["rayClusterSpec"] if resource["kind"] == "RayJob" else resource["spec"]


def groups_of(resource: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(resource)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates_of(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of every group, and of the submitter of a job."""
    own = resource["spec"].get("submitterPodTemplate")
    return [g["template"] for g in groups_of(resource)] + ([own] if own else [])


def check_pod_template(template: dict[str, Any]) -> None:
    """Against Kubernetes' own schema, unknown fields refused."""
    wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
    kubernetes_validate.validate(wrapped, KUBERNETES_VERSION, strict=True)


# -- commands --------------------------------------------------------------------------------------------------------


def training_commands(text: str) -> list[list[str]]:
    """Words of every `jobs/train.py ...` in a file, those in its comments included."""
    text = re.sub(r"\\\n#?\s*", " ", text)  # continued lines
    return [shlex.split(found) for found in re.findall(r"jobs/train\.py ([^\n]*(?:\n {4}--[^\n]*)*)", text)]


def config_of(words: list[str]) -> Config:
    """The config a command would run with; fails on a flag or file that does not exist."""
    return load_config([w.replace(INSTALLED, str(ROOT)) for w in words])


@pytest.mark.parametrize("path", sorted(p for p in DEPLOY.rglob("*.yaml") if p.name != "storage.yaml"))
def test_every_training_command_is_a_config(path):
    commands = training_commands(path.read_text())
    assert commands
    for words in commands:
        config = config_of(words)
        assert config.train.gpu
        for place in (config.run_dir, config.data.root):  # a job's own directory is deleted after it
            assert place.startswith("/shared/") or "://" in place


def test_a_training_command_with_a_wrong_flag_is_found():
    words = training_commands("python jobs/train.py --train.wokers 8")[0]
    with pytest.raises(Exception, match=r"train\.workers"):
        config_of(words)


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {o for p in start.params for o in p.opts}


def ray_start_words(commands: list[str]) -> list[list[str]]:
    return [c.split("ray start", 1)[1].split() for c in commands if "ray start" in c]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_flags_of_ray_start_exist(name):
    config = launcher(name)
    starts = ray_start_words(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert len(starts) == 2
    for words in starts:
        flags = {w.split("=")[0] for w in words if w.startswith("--")}
        assert flags <= ray_start_options() and flags


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_parameters_of_ray_start_exist(name):
    for group in groups_of(kuberay(name)):
        assert {f"--{k}" for k in group["rayStartParams"]} <= ray_start_options()


# -- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAY_FILES)
def test_kuberay_resources(name):
    resource = kuberay(name)
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    for template in templates_of(resource):
        check_pod_template(template)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r["spec"].update(entryPoint="x"),
        lambda r: r["spec"].update(submissionMode="HttpMode"),
        lambda r: cluster_of(r)["authOptions"].update(mode="tokens"),
        lambda r: cluster_of(r)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda r: cluster_of(r)["workerGroupSpecs"][0].update(replica=2),
        lambda r: cluster_of(r)["workerGroupSpecs"][0]["template"]["spec"].update(toleration=[]),
        lambda r: cluster_of(r)["headGroupSpec"]["template"]["spec"]["containers"][0].update(resource={}),
    ],
)
def test_the_check_finds_a_wrong_field(damage):
    resource = copy.deepcopy(kuberay("rayjob"))
    damage(resource)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, SCHEMAS["RayJob"])
        for template in templates_of(resource):
            check_pod_template(template)


def test_storage():
    resources = list(yaml.safe_load_all((DEPLOY / "kuberay" / "storage.yaml").read_text()))
    for resource in resources:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    claim, policy = resources
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for name in RAY_FILES:
        for template in templates_of(kuberay(name)):
            assert labels.items() <= template["metadata"]["labels"].items(), "a pod outside the wall"
        for group in groups_of(kuberay(name)):
            volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
            assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def reached(policy: dict[str, Any], address: str, port: int) -> bool:
    """Whether a pod may open a connection to an address outside of the cluster's pods."""
    ip = ipaddress.ip_address(address)
    for rule in policy["spec"]["egress"]:
        if "ports" in rule and not any(p["port"] == port for p in rule["ports"]):
            continue
        for block in (to["ipBlock"] for to in rule["to"] if "ipBlock" in to):
            if ip in ipaddress.ip_network(block["cidr"]):
                return not any(ip in ipaddress.ip_network(n) for n in block["except"])
    return False


def test_pods_reach_storage_and_no_neighbors():
    *_, policy = yaml.safe_load_all((DEPLOY / "kuberay" / "storage.yaml").read_text())
    assert all(rule.get("to") for rule in policy["spec"]["egress"]), "a rule without addresses opens all"
    assert reached(policy, "52.216.0.1", 443) and reached(policy, "2600::1", 443)
    assert not reached(policy, "52.216.0.1", 80) and not reached(policy, "52.216.0.1", 22)
    for private in (
        "169.254.169.254",
        "10.96.0.1",
        "172.17.0.2",
        "192.168.1.1",
        "100.64.0.9",
        "fd00:ec2::254",
        "fe80::1",
    ):
        assert not reached(policy, private, 443), private


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_configs(name):
    """As `ray up` reads them: filled with Ray's defaults, then against its schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher(name))
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"head_start_commands": []})


# -- who runs where --------------------------------------------------------------------------------------------------


def offered(groups: list[dict[str, float]], kind: str) -> float:
    return sum(g.get(kind, 0) * g["nodes"] for g in groups)


def kuberay_groups(name: str) -> list[dict[str, float]]:
    """What each group offers to Ray; a number of CPUs that is not given would be guessed from the pod's limits."""
    found = []
    for group in groups_of(kuberay(name)):
        start = group["rayStartParams"]
        found.append({"nodes": group.get("replicas", 1), "CPU": int(start["num-cpus"]), "GPU": int(start.get("num-gpus", 0))})
    return found


def launcher_groups() -> list[dict[str, float]]:
    types = launcher("aws")["available_node_types"]
    return [{"nodes": t.get("min_workers", 1), **t["resources"]} for t in types.values()]


@pytest.mark.parametrize("name", [*RAY_FILES, "aws"])
def test_the_cluster_is_as_large_as_its_run_needs(name):
    """The arithmetic of check_resources, group by group: workers fill the GPU nodes, readers fit beside them."""
    groups = launcher_groups() if name == "aws" else kuberay_groups(name)
    folder = "launcher" if name == "aws" else "kuberay"
    config = config_of(training_commands((DEPLOY / folder / f"{name}.yaml").read_text())[0])
    head, train, data = groups
    assert head["CPU"] == 0, "workers or readers would be placed on the head"
    assert offered([train], "GPU") == config.train.workers == offered(groups, "GPU")
    assert train["CPU"] == train["GPU"] * config.train.cpus_per_worker, "readers would be placed beside the workers"
    assert offered([data], "CPU") >= config.train.workers * config.data.readers
    assert offered(groups, "CPU") >= needed_cpus(config)


@pytest.mark.parametrize("name", RAY_FILES)
def test_pods_hold_what_they_offer(name):
    for group in groups_of(kuberay(name)):
        (container,) = group["template"]["spec"]["containers"]
        limits, start = container["resources"]["limits"], group["rayStartParams"]
        assert container["resources"]["requests"] == limits
        assert int(limits.get("nvidia.com/gpu", 0)) == int(start.get("num-gpus", 0))
        assert int(limits["cpu"]) >= int(start["num-cpus"])
        (shm,) = (v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")
        assert shm["medium"] == "Memory" and "/dev/shm" in [m["mountPath"] for m in container["volumeMounts"]]
        store, room, memory = int(start["object-store-memory"]), gib(shm["sizeLimit"]), gib(limits["memory"])
        assert store < room < memory / 1.5
    for group in cluster_of(kuberay(name))["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return int(quantity[:-2]) * 2**30


# -- closed to strangers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAY_FILES)
def test_kubernetes_is_closed(name):
    resource = kuberay(name)
    cluster = cluster_of(resource)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP" and cluster["headGroupSpec"]["enableIngress"] is False
    for template in templates_of(resource):
        spec = template["spec"]
        assert not spec.get("hostNetwork") and spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in p for p in container.get("ports", []))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_launcher_is_closed(name):
    config = launcher(name)
    head, worker = (config[f"{kind}_start_ray_commands"] for kind in ("head", "worker"))
    for command in head + worker:
        assert "ray start" not in command or "RAY_AUTH_MODE=token ray start" in command
    (words,) = ray_start_words(head)
    assert "--dashboard-host=127.0.0.1" in words
    assert "/home/mmref/.ray/auth_token" in config["file_mounts"]
    for rule in config["provider"].get("security_group", {}).get("IpPermissions", []):
        assert all(not r["CidrIp"].endswith("/0") for r in rule["IpRanges"])


# -- the image -------------------------------------------------------------------------------------------------------


IMAGES = ["Dockerfile", "serve.Dockerfile"]


def instructions(image: str = "Dockerfile") -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = "\n".join(line for line in (DEPLOY / image).read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in (line.split(maxsplit=1) for line in lines)]


def of(instruction: str, image: str = "Dockerfile") -> list[str]:
    return [arguments for word, arguments in instructions(image) if word == instruction]


def sent_to_the_build() -> set[str]:
    """First parts of the paths that .dockerignore lets through: it refuses everything and names what is wanted."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    return {line[1:] for line in lines if line.startswith("!")}


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_is_built_from_what_is_sent_to_it(image):
    sent = sent_to_the_build()
    assert all((ROOT / name).exists() for name in sent)
    for copied in of("COPY", image):
        *sources, _ = [w for w in copied.split() if not w.startswith("--")]
        for source in sources:
            assert source == "." or ((ROOT / source).exists() and {source, source.split("/")[0]} & sent), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {p.rstrip("*") for p in packages} | {project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | {"configs", "jobs"} <= sent
    secret = {".git", "runs", "tests", ".venv"}
    assert not secret & sent


@pytest.mark.parametrize(("image", "built"), [("Dockerfile", ["mmref.train.build_ops"]), ("serve.Dockerfile", [])])
def test_what_the_image_runs_exists(image, built):
    text = "\n".join(of("RUN", image))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r'"\.\[([\w,]+)\]"', text):
        assert set(names.split(",")) <= set(extras)
    modules = [m for m in re.findall(r"python3? -m ([\w.]+)", text) if m != "venv"]
    assert modules == built and all(map(importlib.util.find_spec, modules))
    assert "pip install" in text and "--no-deps" in text


def pins() -> dict[str, str]:
    """Version of each package of constraints.txt."""
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines) and not any("/" in line or "+" in line for line in lines)
    return {canonicalize_name(name): version for name, version in found.items()}


def brought(requirement: Requirement) -> list[Requirement]:
    """What a package that is installed here needs itself. Torch names its own, by platform and exactly."""
    if requirement.name == "torch":
        return []
    needed = [Requirement(text) for text in importlib.metadata.requires(requirement.name) or []]
    extras = requirement.extras or {""}
    return [r for r in needed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]


@pytest.mark.parametrize(("image", "without"), [("Dockerfile", set()), ("serve.Dockerfile", {"ray", "deepspeed", "tensorboard"})])
def test_the_image_is_made_of_versions_that_were_tested(image, without):
    (install,) = [a for a in of("RUN", image) if '".[' in a]
    assert "--constraint constraints.txt" in install
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    project, pinned, seen = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], pins(), set()
    direct = [*project["dependencies"], *(r for e in extras.split(",") for r in project["optional-dependencies"][e])]
    waiting = [Requirement(text) for text in direct]
    while waiting:
        requirement = waiting.pop()
        if requirement.name == project["name"]:  # an extra that holds another
            waiting += [Requirement(text) for e in requirement.extras for text in project["optional-dependencies"][e]]
            continue
        assert requirement.name not in without
        version = pinned.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version, prereleases=True), (str(requirement), version)
        waiting += [r for r in brought(requirement) if (key := str(r)) not in seen and not seen.add(key)]


def test_images_are_named_by_version():
    text = "\n".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    named = re.findall(r"image: (?:&\w+ )?(\S*mmref:\S+)", text) + re.findall(r"build .*-t (\S+)", text)
    assert {re.sub(r".*mmref:|-\w+$", "", name) for name in named} == {mmref.__version__} and len(named) > 5
    assert "latest" not in text and re.search(r"BASE_IMAGE=python:3\.12\.\d+-", text)


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_has_a_choice_of_base_and_an_ordinary_user(image):
    assert instructions(image)[0][0] == "ARG" and instructions(image)[0][1].startswith("BASE_IMAGE=python:3.12.")
    assert of("FROM", image) == ["${BASE_IMAGE}"]
    assert of("USER", image) == ["mmref"]
    (installed,) = [i for i, (_, a) in enumerate(instructions(image)) if '".[' in a]
    assert instructions(image).index(("USER", "mmref")) < installed
    assert "--host" not in " ".join(of("CMD", image)), "it would listen before anybody has set a token"


def test_the_image_builds_its_operator_as_its_user_and_asks_for_a_token():
    created = next(i for i, (_, a) in enumerate(instructions()) if "useradd --uid 1000" in a)
    built = next(i for i, (_, a) in enumerate(instructions()) if "build_ops" in a)
    assert created < instructions().index(("USER", "mmref")) < built
    assert "RAY_AUTH_MODE=token" in " ".join(of("ENV"))
    assert not of("EXPOSE")
