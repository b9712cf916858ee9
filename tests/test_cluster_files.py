"""The files that make clusters, against the schemas of those who read them."""

import json
import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from spice_ray.recipe import load_recipe
from spice_ray.sweep import load_sweep
from spice_ray.trial_recipes import check_trials

REPOSITORY = Path(__file__).parent.parent
KUBERNETES = "1.30"
# Fields by the reference of KubeRay's interface ray.io/v1; its schema is in no registry of packages.
JOB = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "entrypoint", "entrypointNumCpus"),
    *("entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec"),
    *("runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate"),
    *("suspend", "ttlSecondsAfterFinished"),
}
CLUSTER = {
    *("autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "rayVersion", "suspend", "workerGroupSpecs"),
}
AUTOSCALER = {
    *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext"),
    *("upscalingMode", "version", "volumeMounts"),
}
HEAD = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKERS = {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams"),
    *("replicas", "scaleStrategy", "suspend", "template"),
}


@pytest.fixture
def kuberay() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "jobs" / "kuberay.yaml").read_text())
    return found


def test_the_job_of_kuberay_has_fields_that_there_are(kuberay: dict[str, Any]) -> None:
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayJob")
    spec = kuberay["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec.keys() <= JOB
    assert cluster.keys() <= CLUSTER
    assert cluster["autoscalerOptions"].keys() <= AUTOSCALER
    assert cluster["headGroupSpec"].keys() <= HEAD
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= WORKERS
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # Ray takes all of them for text.
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict)


def test_its_pods_are_pods_of_kubernetes(kuberay: dict[str, Any]) -> None:
    cluster = kuberay["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        mounted = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    broken = {**pod, "spec": {**pod["spec"], "container": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_its_command_is_one_that_the_workers_have_room_for(kuberay: dict[str, Any]) -> None:
    program, job, sweep_file, *rest = shlex.split(kuberay["spec"]["entrypoint"])
    assert program == "python"
    assert (REPOSITORY / job).is_file()
    assert rest[:4:2] == ["--data", "--out"]
    sweep = load_sweep(str(REPOSITORY / sweep_file))
    recipe = load_recipe(sweep.recipe, rest[4:])
    check_trials(recipe, sweep)
    (group,) = kuberay["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert recipe.scale.cpus_per_worker < int(limits["cpu"])  # one is left for the tasks that read
    assert recipe.scale.gpus_per_worker <= int(limits["nvidia.com/gpu"])
    assert recipe.scale.least_workers <= group["maxReplicas"]


def test_all_files_name_the_version_of_ray_that_the_lock_has(kuberay: dict[str, Any]) -> None:
    assert kuberay["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-" in (REPOSITORY / "jobs" / "Dockerfile").read_text()
    locked = re.search(r"^ray\[?[^=]*==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert locked[1] == ray.__version__


def test_the_cluster_launcher_takes_its_file() -> None:
    schema = json.loads((resources.files("ray") / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((REPOSITORY / "jobs" / "aws.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_worker": 3}, schema)
