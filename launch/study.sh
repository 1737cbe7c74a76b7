#!/usr/bin/env bash
# What synchronization buys: trains digits-seg with 8 images a step, spread over 8, 4, 2 and 1 processes, and leaves a
# CSV file, a table and two pictures in runs/study. Interrupted, the same command goes on where it was.
#
#   launch/study.sh             # about 45 minutes on two CPU cores
#   launch/study.sh --quick     # less than a minute: whether it works
#   launch/study.sh --help
#
# `python` is the one of the active environment; in a checkout without one, that of `make setup`.
set -euo pipefail

checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python
if [[ -z "${VIRTUAL_ENV:-}" && -x "$checkout/.venv/bin/python" ]]; then
  python="$checkout/.venv/bin/python"
fi

exec "$python" -m syncbn.training.study "$@"
