#!/usr/bin/env bash
# Makes /mnt/scratch, where Ray spills objects: the machine's first local NVMe disk where it has one, else a folder of the root disk.
set -euo pipefail
scratch=${1:-/mnt/scratch}
disk=$(lsblk -dpno NAME,MODEL | awk '/Instance Storage/ {print $1; exit}')
sudo mkdir -p "$scratch"
if [ -n "$disk" ] && ! lsblk -no MOUNTPOINT "$disk" | grep -q .; then
  sudo mkfs.ext4 -q -F "$disk"
  sudo mount -o noatime,discard "$disk" "$scratch"
fi
sudo chmod 1777 "$scratch"
