#!/usr/bin/env bash
# Trains on several nodes. Every node runs the same line; one of them is the rendezvous, by a name or address that the
# others reach. What is no option of the launcher (`--help` lists them) goes to Hydra:
#
#   launch/multinode.sh --nnodes=2 --rdzv-endpoint=node0:29400 --max-restarts=3 ckpt_path=auto experiment=study
#
# The checkout, the data and the run folder have the same paths on all nodes; the run folder is one that all share.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# When the network is cut, PyTorch's store tells the launcher's user in pages of C++ what the launcher tells in a line.
# The launcher takes both variables out again for its processes.
if [[ -z "${TORCH_CPP_LOG_LEVEL:-}" ]]; then
  export TORCH_CPP_LOG_LEVEL=ERROR SYNCBN_QUIET_LAUNCHER=1
fi

exec "$python" -m syncbn.training.multinode "$@"
