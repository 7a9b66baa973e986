#!/usr/bin/env bash
# The main job on built-in data: data -> distil -> export to three targets at int4 -> verify -> bench -> report.
# A step whose output exists is skipped, so an interrupted demo goes on where it stopped (make clean starts over).
set -euo pipefail
OUT=${OUT:-demo_out}
TEACHER=distill/demo_teacher
STEPS=${STEPS:-1500}
mkdir -p "$OUT/checkpoints" "$OUT/bundles" "$OUT/results"

step() { # step OUTPUT COMMAND...: run unless OUTPUT is there
    local output=$1
    shift
    if [[ -e $output ]]; then
        echo "have  $output" >&2
    else
        echo "+ $*" >&2
        "$@"
    fi
}

step "$OUT/data" alignkd-data make-demo "$OUT/data"
step "$OUT/checkpoints/start" alignkd-distill init --teacher "$TEACHER" --output "$OUT/checkpoints/start"
for losses in ce paper; do
    step "$OUT/checkpoints/student-$losses" alignkd-distill --losses "$losses" --teacher "$TEACHER" \
        --student "$OUT/checkpoints/start" --data "$OUT/data/train.json" --output "$OUT/checkpoints/student-$losses"
done
