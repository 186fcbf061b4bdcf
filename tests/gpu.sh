#!/usr/bin/env bash
# What a GPU makes of --data gsm8k: the four commands with the seconds of each, then the bench.
#
#   bash tests/gpu.sh out/gsm8k                     # about ten minutes on an H200
#   bash tests/gpu.sh out/tiny --n-layer 1 --n-head 1 --n-embd 16 --renumber 0 --sft-steps 2 --steps 4
#
# The first argument is the folder to write to; all others are flags of train_sup.py. To try it on a
# CPU: STEPS are the updates of phase 3, PRESET the flags of the bench, such as "--preset toy".
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
shift

timed() {
    local start=$SECONDS
    python "$@"
    echo "-- $((SECONDS - start)) s: $1"
}

timed train_sup.py --data gsm8k --out "$out" "$@"
timed compress.py --out "$out"
timed train_latent.py --out "$out" ${STEPS:+--steps "$STEPS"}
timed analyze.py --batch-size 700 --limit 1400 --out "$out"
timed -m lab.bench --quick ${PRESET:---preset gsm8k}
