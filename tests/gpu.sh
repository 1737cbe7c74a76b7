#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: all tests, with compiled kernels and NCCL, then the benchmarks.
#
# Needs this repository and a Python with torch, lightning and pytest (PYTHON, python3 if unset); installs nothing. Tests
# of what is not installed are left out and named. Results go to RESULTS, docs/benchmarks if unset, dated, with the GPU's
# name. The benchmarks run whatever the tests say; the exit status is that of the first that failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python3}
results=${RESULTS:-docs/benchmarks}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1

if ! name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2>&1); then
    echo "make gpu: $python finds no GPU (${name##*$'\n'}). Without one, run: make test" >&2
    exit 1
fi
name=${name##*$'\n'}  # behind what PyTorch may have to say first
mkdir -p "$results" || exit
prefix="$results/$(date +%F)-$name"

status=0
try() {
    "$@" && return
    local failed=$?
    [ "$status" -ne 0 ] || status=$failed
}

workers=() # compiling some hundred variants of the kernels is most of the tests' time
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi
try "$python" -m pytest -p no:cacheprovider -q -rs --continue-on-collection-errors "${workers[@]}" tests
for mode in layer exchange step memory; do
    try "$python" -m syncbn.bench "$mode" --json "$prefix-$mode.json" --plot "$prefix-$mode.png"
done
try "$python" -m syncbn.bench scaling --from "$prefix-exchange.json" \
    --json "$prefix-scaling.json" --plot "$prefix-scaling.png"
exit "$status"
