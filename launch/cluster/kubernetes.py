"""Kubernetes: a JobSet, or a TrainJob of Kubeflow Trainer, with the files of the launch in a ConfigMap.

Manifests are JSON, which kubectl takes as YAML. Commands are lists: no shell reads them. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from ...trainer.errors import EXIT_NUMERICS, EXIT_STORAGE, EXIT_USER, ConfigError
from .config import ClusterConfig
from .job import Job, encode
from .node import PORT

MOUNT = "/etc/basestone"
RUN_FILE = f"{MOUNT}/run.toml"
NEVER_AGAIN = [EXIT_USER, EXIT_STORAGE, EXIT_NUMERICS]


def manifests(job: Job, cluster: ClusterConfig, run_text: str) -> list[dict[str, Any]]:
    """Give what is to be applied: the run's files, and the pods.

    Raises:
        ConfigError: there are secrets and no Secret.
    """
    section = cluster.kubernetes
    if job.secrets and section.secret is None:
        values = " ".join(f"--from-literal={name}=..." for name in job.secrets)
        raise ConfigError(
            f"secrets: pods take {', '.join(job.secrets)} from a Secret: `kubectl create secret generic "
            f'basestone-secrets {values}`, then secret = "basestone-secrets" in [kubernetes]'
        )
    metadata = {"name": job.name, **({"namespace": section.namespace} if section.namespace else {})}
    files = {"job.json": job.as_json(), "run.toml": run_text}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files}
    pods = (
        _train_job(job, cluster, metadata) if section.kind == "TrainJob" else _job_set(job, cluster, metadata)
    )
    return [config, pods]


def identity(name: str, cluster: ClusterConfig) -> str:
    """Name a job as kubectl's commands take it."""
    namespace = cluster.kubernetes.namespace
    return f"{cluster.kubernetes.kind.lower()}/{name}" + (f" -n {namespace}" if namespace else "")


def text(items: list[dict[str, Any]]) -> str:
    """Write manifests as one file for `kubectl apply -f`."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1) + "\n"


def _command() -> list[str]:
    return ["python3", "-m", "basestone.launch.cluster.node", encode(PurePosixPath(MOUNT) / "job.json")]


def _variables(job: Job, cluster: ClusterConfig) -> list[dict[str, Any]]:
    named = [{"name": name, "value": value} for name, value in job.environment.items()]
    secret = cluster.kubernetes.secret
    return named + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}} for name in job.secrets
    ]


def _volumes(job: Job, cluster: ClusterConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give where a pod sees what, and what that is."""
    section = cluster.kubernetes
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "files", "mountPath": MOUNT}]
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{section.shm_gb}Gi"}},
        {"name": "files", "configMap": {"name": job.name}},
    ]
    if section.claim:
        mounts.append({"name": "runs", "mountPath": section.mount})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": section.claim}})
    return mounts, volumes


def _job_set(job: Job, cluster: ClusterConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    section = cluster.kubernetes
    mounts, volumes = _volumes(job, cluster)
    meeting = {"name": "BASESTONE_ENDPOINT", "value": f"{job.name}-node-0-0.{job.name}:{PORT}"}
    container = {
        "name": "node",
        "image": section.image,
        "command": _command(),
        "env": [meeting, *_variables(job, cluster)],
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": {section.gpu_resource: job.processes_per_node}},
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": section.grace_s,
        "containers": [container],
        "volumes": volumes,
        **({"serviceAccountName": section.service_account} if section.service_account else {}),
        **({"nodeSelector": section.node_selector} if section.node_selector else {}),
    }
    stops = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "node", "operator": "In", "values": NEVER_AGAIN},
    }
    nodes = {
        "parallelism": job.max_nodes,
        "completions": job.max_nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [stops]},
        "template": {"spec": pod},
    }
    labels = {"kueue.x-k8s.io/queue-name": section.queue} if section.queue else {}
    rule = {"name": "theUsersInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {**metadata, **({"labels": labels} if labels else {})},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [rule]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": nodes}}],
        },
    }


def _train_job(job: Job, cluster: ClusterConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    section = cluster.kubernetes
    mounts, volumes = _volumes(job, cluster)
    labels = {"kueue.x-k8s.io/queue-name": section.queue} if section.queue else {}
    pod = {
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
        **({"serviceAccountName": section.service_account} if section.service_account else {}),
        **({"nodeSelector": section.node_selector} if section.node_selector else {}),
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {**metadata, **({"labels": labels} if labels else {})},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": section.image,
                "numNodes": job.max_nodes,
                "numProcPerNode": job.processes_per_node,
                "command": _command(),
                "env": _variables(job, cluster),
                "resourcesPerNode": {"limits": {section.gpu_resource: job.processes_per_node}},
            },
            "runtimePatches": [
                {
                    "manager": "basestone.example/launch",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {
                                "replicatedJobs": [
                                    {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
                                ]
                            }
                        }
                    },
                }
            ],
        },
    }
