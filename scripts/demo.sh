#!/usr/bin/env bash
# The main job on built-in data: data -> distil -> export to three targets at int4 -> verify -> bench -> report.
# A step whose output exists is skipped, so an interrupted demo goes on where it stopped (remove OUT to start over).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-demo_out}
STEPS=${STEPS:-1500}
LIMIT=${LIMIT:-0} # questions per benchmark; 0 = all
TEACHER=${TEACHER:-distill/demo_teacher}
START=${START:-distill/demo_student} # pretrained on descriptions and terse questions, as MobileVLM is on captions
DATA=$OUT/data
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

make_once() { # make_once OUTPUT COMMAND...: run unless OUTPUT is there
    local output=$1
    shift
    [[ -e $output ]] && { echo "have $output" >&2; return; }
    printf '\n+ %s\n' "$*" >&2
    "$@"
}

mkdir -p "$OUT/checkpoints" "$OUT/bundles" "$OUT/results"
make_once "$DATA" alignkd-data make-demo "$DATA"
printf '\n+ alignkd-data check %s\n' "$DATA" >&2
alignkd-data check "$DATA"

for losses in ce ours; do
    student=$OUT/checkpoints/student-$losses
    resume=()
    [[ -d $student.work ]] && resume=(--resume)
    make_once "$student" alignkd-distill --recipe "recipes/demo_$losses.yaml" --teacher "$TEACHER" --student "$START" \
        --data "$DATA/train.json" --output "$student" --max-steps "$STEPS" "${resume[@]}"
done

# The float models run as fp32 ONNX bundles: the same files, prompts and scoring as on every other target.
export_bundle() { # export_bundle NAME CHECKPOINT TARGET PRECISION
    make_once "$OUT/bundles/$1" alignkd-export "$2" --target "$3" "--$4" --name "$1" --output "$OUT/bundles/$1"
}
export_bundle teacher-fp32 "$TEACHER" onnx fp32
export_bundle student-ce-fp32 "$OUT/checkpoints/student-ce" onnx fp32
export_bundle student-alignkd-fp32 "$OUT/checkpoints/student-ours" onnx fp32
for target in onnx executorch coreml; do
    export_bundle "student-alignkd-int4-$target" "$OUT/checkpoints/student-ours" "$target" int4
done

for bundle in "$OUT"/bundles/*; do
    printf '\n+ alignkd-verify %s\n' "$bundle" >&2
    alignkd-verify "$bundle"
done

make_once "$OUT/results/latency.json" alignkd-bench run "$OUT"/bundles/* --threads 1 --output "$OUT/results/latency.json"
limit=()
((LIMIT > 0)) && limit=(--limit "$LIMIT")
for bundle in "$OUT"/bundles/*; do
    result=$OUT/results/accuracy-$(basename "$bundle").json
    make_once "$result" alignkd-bench accuracy "$bundle" --data "$DATA/benchmarks" --threads 1 --output "$result" "${limit[@]}"
done
rm -f "$OUT/report.html"
printf '\n+ alignkd-bench report\n' >&2
alignkd-bench report "$OUT"/results/*.json --output "$OUT/report.html"
