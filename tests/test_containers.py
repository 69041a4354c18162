"""The image's steps, the development container and the Kubernetes manifest name what exists and agree. No builder is needed."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "configs" / "cluster"
INSTRUCTION = re.compile(r"^(FROM|ARG|RUN|COPY|ENV|USER|WORKDIR|CMD) (.+)$", re.MULTILINE)
FIELDS: dict[str, dict[str, Any]] = {
    "Service": {"apiVersion": "v1", "spec": {"clusterIP", "publishNotReadyAddresses", "selector"}},
    "NetworkPolicy": {"apiVersion": "networking.k8s.io/v1", "spec": {"podSelector", "policyTypes", "ingress"}},
    "Job": {
        "apiVersion": "batch/v1",
        "spec": {"completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy", "template"},
    },
}
POD = {
    "subdomain", "restartPolicy", "automountServiceAccountToken", "enableServiceLinks", "securityContext",
    "terminationGracePeriodSeconds", "containers", "volumes",
}  # fmt: skip
CONTAINER = {"name", "image", "workingDir", "securityContext", "env", "command", "resources", "volumeMounts"}
"""Names as in the schema of Kubernetes 1.37, against which the manifest was validated by kubernetes-validate (2026-11-28)."""


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, with continued lines joined and comments left out."""
    text = (CLUSTER / "Dockerfile").read_text()
    return INSTRUCTION.findall(re.sub(r"\s*\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)))


def arguments(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def test_every_line_of_the_dockerfile_is_an_instruction() -> None:
    text = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(instructions()) > 10


def test_the_image_copies_what_exists_and_all_that_is_installed() -> None:
    sources = {source for rest in arguments("COPY") for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0].rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = {"pyproject.toml", "run.sh", "configs", project["project"].get("readme", "README.md"), *packages}
    assert needed | {path.name for path in ROOT.glob("requirements*.lock")} <= sources
    ignored = {line for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"}
    assert not ignored & sources


def test_the_image_installs_by_run_sh_and_the_torch_that_is_pinned() -> None:
    steps = " ".join(arguments("RUN"))
    assert "./run.sh install" in steps
    assert os.access(ROOT / "run.sh", os.X_OK)
    assert re.search(r"^  install\) install ;;$", (ROOT / "run.sh").read_text(), re.MULTILINE)
    pinned = next(
        name
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if name.startswith("torch==")
    )
    assert re.findall(r"torch==[\d.]+", steps) == [pinned]
    named = {line.split("=")[0] for line in arguments("ARG")}
    assert named == {"BASE", "DEVICE"}
    asked = re.findall(r"--build-arg (\w+)=", (CLUSTER / "Dockerfile").read_text())
    assert set(asked) == named


def test_the_pods_find_in_the_image_what_they_start() -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())}
    pod = parts["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (folder,) = arguments("WORKDIR")
    assert container["workingDir"] == folder
    assert arguments("ENV") == [f"PATH={folder}/.venv/bin:$PATH"]
    assert arguments("USER") == [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
    for script in re.findall(r"[\w/]+\.py", " ".join(container["command"])):
        assert (ROOT / script).is_file()
        assert any(script.startswith(f"{source}/") for rest in arguments("COPY") for source in rest.split()[:-1])


@pytest.mark.parametrize("kind", FIELDS)
def test_the_manifest_has_only_known_fields(kind: str) -> None:
    parts = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))
    assert [part["kind"] for part in parts] == list(FIELDS)
    part = next(part for part in parts if part["kind"] == kind)
    assert part.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert part["apiVersion"] == FIELDS[kind]["apiVersion"]
    assert part["spec"].keys() <= FIELDS[kind]["spec"]
    if kind == "Job":
        pod = part["spec"]["template"]["spec"]
        assert pod.keys() <= POD
        assert all(container.keys() <= CONTAINER for container in pod["containers"])


def test_the_development_container_builds_a_stage_that_is_there_and_installs() -> None:
    described = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    build = described["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() == CLUSTER / "Dockerfile"
    assert (ROOT / ".devcontainer" / build["context"]).resolve() == ROOT
    assert f"AS {build['target']}" in " ".join(arguments("FROM"))
    assert build["args"].keys() <= {line.split("=")[0] for line in arguments("ARG")}
    assert described["workspaceFolder"] == arguments("WORKDIR")[0]
    assert described["postCreateCommand"] == "./run.sh install"
