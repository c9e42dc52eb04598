"""AWS's instance types that cluster.yaml uses, from its pages on them; one that is not here is one that nobody has looked up."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InstanceType:
    num_cpus: int
    num_gpus: int
    memory_bytes: int
    nvme_bytes: int


INSTANCE_TYPES = {
    "m7i.2xlarge": InstanceType(8, 0, 32 << 30, 0),
    "r6id.4xlarge": InstanceType(16, 0, 128 << 30, 950 * 10**9),
    "g6.4xlarge": InstanceType(16, 1, 64 << 30, 600 * 10**9),
}
