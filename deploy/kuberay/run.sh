#!/usr/bin/env bash
# Runs RayJobs of deploy/kuberay/jobs one after the other; ends with 1 and the job's message at the first that does not succeed.
#
#   deploy/kuberay/run.sh JOB...
set -euo pipefail
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/jobs

field() {
  kubectl get "rayjob/$1" -o "jsonpath={.status.$2}"
}

for job in "$@"; do
  kubectl apply -f "$jobs/$job.yaml"
  # the job's own end, or KubeRay's failure to start it, which leaves the job without a status
  until [[ "$(field "$job" jobStatus)" =~ ^(SUCCEEDED|FAILED|STOPPED)$ || "$(field "$job" jobDeploymentStatus)" == Failed ]]; do
    sleep "${SECONDS_BETWEEN_LOOKS:-5}"
  done
  if [ "$(field "$job" jobStatus)" != SUCCEEDED ]; then
    echo "$job: $(field "$job" message)" >&2
    exit 1
  fi
done
