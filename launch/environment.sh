# shellcheck shell=bash
# What a job's processes find in their environment, on one node or on many. What is set already stays as it is.

# Processes that each start a thread per core would fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# SyncBatchNorm's and DDP's communicators run at the same time; NCCL must launch them in one order on all ranks.
export NCCL_LAUNCH_ORDER_IMPLICIT="${NCCL_LAUNCH_ORDER_IMPLICIT:-1}"
# An error or a timeout within NCCL ends the process, without a clean-up that could wait for the same dead peer.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# PyTorch's flight recorder remembers so many of a process's last NCCL calls ...
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
# ... and writes them to a file when one of them times out: where did each rank stand?
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# The Python of the active environment; in a checkout without one, that of `make setup`.
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python
if [[ -z "${VIRTUAL_ENV:-}" && -x "$checkout/.venv/bin/python" ]]; then
  # shellcheck disable=SC2034 # the scripts that read this file use it
  python="$checkout/.venv/bin/python"
fi
