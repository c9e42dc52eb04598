"""The fields of KubeRay's custom resources (ray.io/v1, KubeRay 1.6 and later) and of pods that deploy/kuberay uses.

From the API reference at docs.ray.io; a field that is not here is one that nobody has looked up.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$")]
Labels = dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$")], str]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(Model):
    name: Name
    annotations: dict[str, str] = {}


class Resources(Model):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Port(Model):
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,15}$")]
    containerPort: int = Field(ge=1, le=65535)


class NamedRef(Model):
    name: Name


class EnvFrom(Model):
    configMapRef: NamedRef


class SecretKeyRef(Model):
    name: Name
    key: str


class ValueFrom(Model):
    secretKeyRef: SecretKeyRef


class Variable(Model):
    name: str
    valueFrom: ValueFrom


class Mount(Model):
    name: Name
    mountPath: str


class Container(Model):
    name: Name
    image: str
    ports: list[Port] = []
    envFrom: list[EnvFrom] = []
    env: list[Variable] = []
    resources: Resources
    volumeMounts: list[Mount] = []


class Volume(Model):
    name: Name
    emptyDir: dict[str, str]


class Toleration(Model):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class SecurityContext(Model):
    runAsNonRoot: Literal[True]
    runAsUser: int = Field(ge=1)
    fsGroup: int


class PodSpec(Model):
    serviceAccountName: Name
    securityContext: SecurityContext
    tolerations: list[Toleration] = []
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] = []


class Template(Model):
    spec: PodSpec


class HeadGroup(Model):
    labels: Labels
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(Model):
    groupName: Name
    labels: Labels
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    rayStartParams: dict[str, str]
    template: Template


class AuthOptions(Model):
    mode: Literal["token"]
    secretName: Name


class AutoscalerOptions(Model):
    version: Literal["v2"]
    upscalingMode: Literal["Default", "Conservative", "Aggressive"]
    idleTimeoutSeconds: int = Field(ge=1)


class ClusterSpec(Model):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class RayCluster(Model):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Model):
    clusterSelector: dict[Literal["ray.io/cluster"], Name]
    submissionMode: Literal["K8sJobMode", "HTTPMode"]
    entrypoint: str


class RayJob(Model):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class ServiceSpec(Model):
    excludeHeadPodFromServeSvc: bool
    serveConfigV2: str
    rayClusterConfig: ClusterSpec


class RayService(Model):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec
