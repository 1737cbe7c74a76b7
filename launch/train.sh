#!/usr/bin/env bash
# Trains on this machine: one process per GPU over NCCL, or two processes over gloo where there is no GPU.
# Arguments go to Hydra:
#
#   launch/train.sh norm=local trainer.max_epochs=4
#
# `python` is the one of the active environment; in a checkout without one, that of `make setup`.
set -euo pipefail

# Two processes that each start a thread per core would fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# SyncBatchNorm's and DDP's communicators run at the same time; NCCL must launch them in one order on all ranks.
export NCCL_LAUNCH_ORDER_IMPLICIT="${NCCL_LAUNCH_ORDER_IMPLICIT:-1}"
# All processes are on this machine: their sockets need not be reachable from another one.
if [[ "$(uname -s)" == Linux ]]; then
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
fi

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python
if [[ -z "${VIRTUAL_ENV:-}" && -x "$checkout/.venv/bin/python" ]]; then
  python="$checkout/.venv/bin/python"
fi

exec "$python" -m syncbn.training.launch "$@"
