"""deploy/mount_nvme.sh on machines whose disks are told by stubs: where spilled objects go, and that no disk costs the node."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.nodes import ROOT

_STUBS = {
    "sudo": 'exec "$@"',
    "lsblk": """case "$*" in
  "-dpno NAME,MODEL") printf '/dev/nvme0n1 Amazon Elastic Block Store\\n%s' "$DISKS" ;;
  "-no NAME "*) echo "${PARTS:-nvme1n1}" ;;
  "-no MOUNTPOINT "*) echo "${MOUNTED_AT:-}" ;;
esac""",
    "mountpoint": '[ "$2" = "${IS_MOUNTED:-none}" ]',
    "mkfs.ext4": 'echo "mkfs.ext4 $*" >> "$LOG"; [ -z "${IN_USE:-}" ]',
    "mount": 'echo "mount $*" >> "$LOG"; [ -z "${NO_MOUNT:-}" ]',
}
_DISK = {"DISKS": "/dev/nvme1n1 Amazon EC2 NVMe Instance Storage\n"}


@dataclass(frozen=True)
class Machine:
    """Its folders, and what its script would have done to its disks."""

    folder: Path

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    @property
    def images(self) -> Path:
        return self.folder / "nvme"

    def mount(self, **told: str) -> tuple[list[str], str]:
        """The commands on disks, in order, and what was said; the node is there in any case."""
        log = self.folder / "log"
        log.write_text("")
        script = str(ROOT / "deploy/mount_nvme.sh")
        path = f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", script, str(self.scratch), str(self.images)],
            env={"DISKS": "", **told, "PATH": path, "LOG": str(log)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert self.scratch.stat().st_mode & 0o7777 == 0o1777, "every user spills there"
        return log.read_text().splitlines(), done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "bin").mkdir()
    for name, body in _STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return Machine(tmp_path)


def test_the_disk_that_the_image_has_mounted_is_used_and_not_formatted(machine: Machine) -> None:
    machine.images.mkdir()
    done, said = machine.mount(**_DISK, MOUNTED_AT=str(machine.images), IS_MOUNTED=str(machine.images))
    assert done == [f"mount --bind {machine.images}/scratch {machine.scratch}"]
    assert (machine.images / "scratch").is_dir()
    assert not said


def test_a_raw_disk_is_formatted_and_mounted(machine: Machine) -> None:
    done, said = machine.mount(**_DISK)
    assert done == ["mkfs.ext4 -q -F /dev/nvme1n1", f"mount -o noatime,discard /dev/nvme1n1 {machine.scratch}"]
    assert not said


def test_what_is_mounted_already_stays_as_it_is(machine: Machine) -> None:
    """The launcher runs setup commands again on nodes that are there."""
    machine.scratch.mkdir()
    assert machine.mount(**_DISK, IS_MOUNTED=str(machine.scratch)) == ([], "")


@pytest.mark.parametrize(
    "told",
    [
        {},
        {**_DISK, "MOUNTED_AT": "/data"},
        {**_DISK, "PARTS": "nvme1n1\nvg-of-somebody"},
        {**_DISK, "IN_USE": "yes"},
        {**_DISK, "NO_MOUNT": "yes"},
    ],
    ids=["no disk", "mounted elsewhere", "part of a volume", "mkfs refuses", "mount fails"],
)
def test_a_disk_that_cannot_be_had_costs_speed_and_not_the_node(machine: Machine, told: dict[str, str]) -> None:
    done, said = machine.mount(**told)
    assert done[1:] == (["mount -o noatime,discard /dev/nvme1n1 " + str(machine.scratch)] if "NO_MOUNT" in told else [])
    assert bool(done) == ("IN_USE" in told or "NO_MOUNT" in told), "somebody's disk was touched"
    assert "objects spill to the root disk" in said
