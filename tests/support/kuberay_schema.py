"""JSON schema of the parts of ray.io/v1 that deploy/kuberay uses, from the fields of KubeRay's API reference (1.6).

The operator's own CRD is not in any package that the tests could install, so this is a structural check: every field
must exist and have the right type, nothing else may be there. What the CRD embeds from Kubernetes (pod templates) is an
empty schema here and held against Kubernetes' own by the tests.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
KUBERNETES: Schema = {"type": "object"}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def record(required: list[str] | None = None, **fields: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": required or [], "properties": fields}


AUTH = record(["mode"], mode=one_of("disabled", "token"))

HEAD = record(
    ["template"],
    template=KUBERNETES, headService=KUBERNETES, enableIngress=FLAG, rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    resources=TEXTS, labels=TEXTS,
)  # fmt: skip

WORKERS = record(
    ["groupName", "template"],
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts={"type": "integer", "minimum": 1},
    idleTimeoutSeconds=COUNT, suspend=FLAG, rayStartParams=TEXTS, template=KUBERNETES, resources=TEXTS, labels=TEXTS,
)  # fmt: skip

CLUSTER = record(
    ["headGroupSpec"],
    rayVersion=TEXT, authOptions=AUTH, headGroupSpec=HEAD, workerGroupSpecs={"type": "array", "items": WORKERS},
    enableInTreeAutoscaling=FLAG, headServiceAnnotations=TEXTS, suspend=FLAG, managedBy=TEXT,
)  # fmt: skip

JOB = record(
    ["rayClusterSpec", "entrypoint"],
    entrypoint=TEXT, entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), runtimeEnvYAML=TEXT, jobId=TEXT,
    metadata=TEXTS, backoffLimit=COUNT, submitterConfig=record(backoffLimit=COUNT), submitterPodTemplate=KUBERNETES,
    activeDeadlineSeconds={"type": "integer", "minimum": 1}, shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT,
    suspend=FLAG, managedBy=TEXT, clusterSelector=TEXTS, rayClusterSpec=CLUSTER,
)  # fmt: skip


def resource(kind: str, spec: Schema) -> Schema:
    """A whole object of the group."""
    return record(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion=one_of("ray.io/v1"), kind=one_of(kind), spec=spec,
        metadata=record(["name"], name={**TEXT, "pattern": "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"}, namespace=TEXT,
                        labels=TEXTS, annotations=TEXTS),
    )  # fmt: skip


SCHEMAS = {"RayCluster": resource("RayCluster", CLUSTER), "RayJob": resource("RayJob", JOB)}
