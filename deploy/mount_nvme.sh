#!/usr/bin/env bash
# Makes SCRATCH, where Ray spills objects and training keeps requests. It lies on the machine's local NVMe disk where there is one: AWS's deep-learning images mount
# it at IMAGES themselves; other images leave it raw. Else, or if the disk cannot be had, it is a folder of the root disk: slower, but a node.
#
#   deploy/mount_nvme.sh [SCRATCH] [IMAGES]
set -euo pipefail
scratch=${1:-/mnt/scratch} images=${2:-/opt/dlami/nvme}

unused_disk() { # the first instance-store disk that has neither parts nor a mount point
  local disk
  for disk in $(lsblk -dpno NAME,MODEL | awk '/Instance Storage/ {print $1}'); do
    if [ "$(lsblk -no NAME "$disk" | wc -l)" = 1 ] && [ -z "$(lsblk -no MOUNTPOINT "$disk")" ]; then
      echo "$disk"
      return
    fi
  done
}

use_disk() {
  if mountpoint -q "$images"; then
    sudo mkdir -p "$images/scratch" && sudo mount --bind "$images/scratch" "$scratch"
    return
  fi
  local disk
  disk=$(unused_disk)
  [ -n "$disk" ] && sudo mkfs.ext4 -q -F "$disk" && sudo mount -o noatime,discard "$disk" "$scratch"
}

sudo mkdir -p "$scratch"
if ! mountpoint -q "$scratch" && ! use_disk; then
  echo "$scratch: no local NVMe disk is free: objects spill to the root disk" >&2
fi
sudo chmod 1777 "$scratch"
