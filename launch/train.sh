#!/usr/bin/env bash
# Trains on this machine: one process per GPU over NCCL, or two processes over gloo where there is no GPU.
# Arguments go to Hydra:
#
#   launch/train.sh norm=local trainer.max_epochs=4
#   launch/train.sh max_restarts=3                    # after a crash, go on from the last checkpoint
#
# `python` is the one of the active environment; in a checkout without one, that of `make setup`.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# All processes are on this machine: their sockets need not be reachable from another one.
if [[ "$(uname -s)" == Linux ]]; then
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
fi

exec "$python" -m syncbn.training.launch "$@"
