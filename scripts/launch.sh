#!/usr/bin/env bash
# Starts a script on every GPU of this node, with the settings that a long run wants:
#   scripts/launch.sh train.py model=vip_m7 data.root=/data/imagenet
#   NPROC=2 scripts/launch.sh train.py experiment=digits              processes, in place of one a GPU (or one)
#   NNODES=2 RDZV=first-node:29400 scripts/launch.sh train.py ...     the same command on each of two nodes
# MAX_RESTARTS=3 is how often torchrun starts the ranks again after one has died; they go on from the newest checkpoint.
# Whatever is set in the environment already is kept. Exit status: 0 at the end, 2 for an error of the user's, 128 + n where
# signal n has stopped the script before its end, else another.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
host=$(uname -n) # HOSTNAME may have come along from a login node

if [[ ${LAUNCH_NOTES:-} && ${RANK:-} ]]; then # as a rank; what was refused (vip/config.py) or stopped needs no second start
  [[ ! -e $LAUNCH_NOTES/refused && ! -e $LAUNCH_NOTES/stop.$host ]] || exit 0
  exec "$PYTHON" -u "$@"
fi

if [[ ${1:-} != *.py ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
script=$1
shift
[[ -e $script ]] || script=$root/$script

PYTHON=${PYTHON:-$(command -v "$root/.venv/bin/python" || command -v python3)}
if [[ ! ${LAUNCH_NOTES:-} ]]; then # else nodes share a folder, so that an error of all ranks is said once
  LAUNCH_NOTES=$(mktemp -d)
  trap 'rm -rf "$LAUNCH_NOTES"' EXIT
fi
rm -f "$LAUNCH_NOTES/stop.$host"
export PYTHON LAUNCH_NOTES
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                                             # the bits of CPU products depend on it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}       # else restarts meet stale addresses
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}             # a lost peer ends the rank
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}                                 # no stack of every peer that is done

network_to() { # the interface on the way to a host; where that is this one, the interface that others reach it by
  local address
  address=$(getent ahosts "$1" | awk '{print $1; exit}')
  {
    ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'
    ip -o address show to "$address" | awk '{print $2}'
    ip -o route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' # its name may mean 127.0.1.1 there
    ip -o address show up scope global | awk '{print $2}'
  } | grep -vx -m 1 lo
} 2>/dev/null

where=(--standalone)
if [[ ${NNODES:-1} != 1 ]]; then
  where=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-vip}" --rdzv-endpoint="$RDZV" --rdzv-conf=join_timeout=300)
  [[ ! ${SLURMD_NODENAME:-} ]] || where+=(--local-addr="$SLURMD_NODENAME") # the name that other nodes know
  if network=$(network_to "${RDZV%:*}"); then # gloo would take what the host's own name means, NCCL the first that is up
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$network} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$network}
  fi
fi
if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
  gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^([0-9]|GPU-|MIG-)' || true)
else
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi

# torchrun itself must not act on signals, which often reach all processes of a job: it would give the ranks 30 s, or one that
# came twice none, and then fail with a page of tracebacks. So it finds handlers that do nothing, and can set none.
"$PYTHON" -c '
import signal
from torch.distributed.run import main
for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2"):
    signal.signal(getattr(signal, "SIG" + name), lambda *_: None)
signal.signal = lambda *_: None
main()' "${where[@]}" --nproc-per-node="${NPROC:-$((gpus > 0 ? gpus : 1))}" --max-restarts="${MAX_RESTARTS:-3}" \
  --no-python "$root/scripts/launch.sh" "$script" "$@" &
launcher=$!
stopped=
stop() { # tell the ranks; one that is still importing ends of it, is started again and finds the note
  local ranks=()
  [[ ! $stopped ]] || return 0
  stopped=$((128 + $2))
  : >"$LAUNCH_NOTES/stop.$host"
  # A builtin where there is /proc: the signal may be on its way to every child of this shell.
  read -ra ranks <"/proc/$launcher/task/$launcher/children" || [[ ${ranks[*]} ]] || read -ra ranks < <(pgrep -d " " -P "$launcher")
  kill "-$1" "${ranks[@]}" || kill -KILL "$launcher" || true # without ranks it waits for other nodes
} 2>/dev/null
for name in TERM INT HUP QUIT USR1 USR2; do
  # shellcheck disable=SC2064 # name and number are meant as they are now
  trap "stop $name $(kill -l "$name")" "$name"
done
status=0
while kill -0 "$launcher" 2>/dev/null; do # a signal ends the waiting, not what is waited for
  status=0
  wait "$launcher" 2>/dev/null || status=$?
done
status=${stopped:-$status}
[[ ! -e $LAUNCH_NOTES/refused ]] || status=2
exit "$status"
