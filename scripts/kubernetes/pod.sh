#!/usr/bin/env bash
# Trains in one pod of scripts/kubernetes/job.yaml; what follows are overrides of train.py:
#   NNODES=2 RDZV=vip-0.vip:29400 scripts/kubernetes/pod.sh model=vip_m7 name=m7 data.root=/data runs_dir=/runs
# A signal to one pod stops the ranks of all, and to the others that is no failure. The job must start all of them again, so
# here each of them fails (143) while the run is not at its end.
set -uo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-$(command -v "$root/.venv/bin/python" || command -v python3)}
export PYTHON

"$root/scripts/launch.sh" train.py "$@" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null' TERM INT
status=0
while kill -0 "$launcher" 2>/dev/null; do # a signal ends the waiting, not what is waited for
  status=0
  wait "$launcher" || status=$?
done
[[ $status == 0 ]] || exit "$status"
folder=$("$PYTHON" "$root/scripts/slurm/run_folder.py" "$@")
sleep "${SETTLE:-5}" # until a network file system shows what rank 0 wrote on another node
[[ ! -e $folder/PREEMPTED ]] || exit 143
