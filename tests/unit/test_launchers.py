"""The files that start clusters: as their schemas and shells read them. Some name what only their own services know."""

import json
import shlex
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from dlops_dist.command_line import read_settings
from dlops_dist.ray_metrics import GAUGES, RESTARTS

LAUNCH = Path(__file__).parents[2] / "launch"
JOB = {
    "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds",
    "rayClusterSpec", "runtimeEnvYAML", "submissionMode", "suspend",
}  # fmt: skip
CLUSTER = {
    "rayVersion",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Fields of KubeRay's ray.io/v1."""


def test_the_cluster_is_one_by_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    cluster = yaml.safe_load((LAUNCH / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_the_job_has_kuberays_fields_and_a_command_of_ours():
    job = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"].keys() <= JOB
    assert cluster.keys() <= CLUSTER
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert group.keys() <= GROUP
        (container,) = group["template"]["spec"]["containers"]
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    _, _, module, recipe, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert module == "dlops_dist.train"
    settings = read_settings(recipe, arguments)
    gpus = sum(g["replicas"] * int(g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
               for g in groups[1:])  # fmt: skip
    assert (settings.workers, settings.min_workers) == (gpus, 1)


def test_the_dashboard_shows_what_runs_tell_prometheus():
    panels = json.loads((LAUNCH / "grafana.json").read_text())["panels"]
    shown = {target["expr"].partition("{")[0] for panel in panels for target in panel["targets"]}
    assert shown == {f"ray_dlops_dist_{name}" for name in (*GAUGES, RESTARTS)}


@pytest.mark.parametrize(
    "script", sorted([*LAUNCH.glob("*.sh"), *(LAUNCH.parent / ".ci").iterdir()]), ids=lambda path: path.name
)
def test_a_script_is_one(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_the_image_is_made_of_files_that_are_there():
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert all((LAUNCH.parent / name).exists() for name in line.split()[1:-1])


def test_the_workflow_calls_scripts_that_are_there_on_each_version_that_is_named():
    root = LAUNCH.parent
    jobs = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [shlex.split(step["run"], comments=True) for job in jobs.values() for step in job["steps"] if "run" in step]
    scripts = {words[1] for words in runs if words[0] == "bash"}
    assert scripts == {"launch/test.sh", ".ci/run", ".ci/install"}
    assert all((root / script).is_file() for script in scripts)
    classifiers = tomllib.loads((root / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [word.rpartition(" ")[2] for word in classifiers if "Python :: 3." in word]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == versions
