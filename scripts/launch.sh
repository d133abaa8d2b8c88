#!/usr/bin/env bash
# Starts a script on every GPU of this node, with the settings that a long run wants:
#   scripts/launch.sh train.py model=vip_m7 data.root=/data/imagenet
#   NPROC=2 scripts/launch.sh train.py experiment=digits              processes, in place of one a GPU (or one)
#   NNODES=2 RDZV=first-node:29400 scripts/launch.sh train.py ...     the same command on each of two nodes
# MAX_RESTARTS=3 is how often torchrun starts the ranks again after one has died; they go on from the newest checkpoint.
# Whatever is set in the environment already is kept.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${LAUNCH_NOTES:-} && ${RANK:-} ]]; then # as a rank; what was refused once (vip/config.py) needs no second start
  [[ ! -e $LAUNCH_NOTES/refused ]] || exit 0
  exec "$PYTHON" -u "$@"
fi

if [[ ${1:-} != *.py ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
script=$1
shift
[[ -e $script ]] || script=$root/$script

PYTHON=${PYTHON:-$(command -v "$root/.venv/bin/python" || command -v python3)}
LAUNCH_NOTES=$(mktemp -d)
trap 'rm -rf "$LAUNCH_NOTES"' EXIT
export PYTHON LAUNCH_NOTES
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                                             # the bits of CPU products depend on it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}       # else restarts meet stale addresses
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}             # a lost peer ends the rank

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
where=(--standalone)
[[ ${NNODES:-1} == 1 ]] || where=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-vip}" --rdzv-endpoint="$RDZV")
# SIGUSR1 and SIGUSR2, a scheduler's warnings, would end torchrun itself if it were not told to pass them on. Signals to this
# shell must reach it too: it runs in the background and is waited for.
"$PYTHON" -m torch.distributed.run "${where[@]}" --nproc-per-node="${NPROC:-$((gpus > 0 ? gpus : 1))}" \
  --max-restarts="${MAX_RESTARTS:-3}" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
  --no-python "$root/scripts/launch.sh" "$script" "$@" &
launcher=$!
for name in TERM INT HUP QUIT USR1 USR2; do
  # shellcheck disable=SC2064 # the name is meant as it is now
  trap "kill -$name $launcher 2>/dev/null" "$name"
done
status=0
while kill -0 "$launcher" 2>/dev/null; do # a signal ends the waiting, not what is waited for
  status=0
  wait "$launcher" || status=$?
done
[[ ! -e $LAUNCH_NOTES/refused ]] || status=2
exit "$status"
