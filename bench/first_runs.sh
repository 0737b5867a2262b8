#!/usr/bin/env bash
# The first training runs on a GPU: 60 s on the kernels, 60 s compiled, 20 s on the references; whether the three agree
# step by step; the largest kernels. Under 8 minutes, whatever happens.
#
#   bench/first_runs.sh DATA             a prepared folder, or TIMEBOX_DATA=folder; OUT=folder PY=python DEADLINE=seconds
#   DEVICE=cpu bench/first_runs.sh DATA  the same parts on a CPU, tiny, all on the references: does this script work?
set -uo pipefail
cd "$(dirname "$0")/.."
data=${1:-${TIMEBOX_DATA:-}}
if [ -z "$data" ] || [ ! -f "$data/manifest.json" ]; then
  echo "error: no prepared folder${data:+ at $data}: ${PY:-.venv/bin/python} -m prepare --source FOLDER --out DATA makes one" >&2
  exit 2
fi
source bench/parts.sh
require_device

ops=(triton compile reference)
long=(--time-budget 60 --eval-tokens 5242880)
short=(--time-budget 20 --eval-tokens 1048576 --device-batch-size 16)
# Runs to be compared step by step leave the scalars alone: bench/runs.py says why. The tiles of the source are as good
# as others for that: only the first run waits for a tuner, if `python -m train.tune` was not run before.
same=(--scalar-lr 0 --tune off --eval-tokens 262144)
# Small micro-batches: plain attention keeps some 13 GB a layer at the default ones.
agree=("${same[@]}" --steps 15 --device-batch-size 16 --total-batch-size 65536)
# The default ones: the graphs that run-compile has compiled come from PyTorch's cache.
full=("${same[@]}" --steps 11)
if [ "$DEVICE" = cpu ]; then
  ops=(reference reference reference)
  long=(--time-budget 2 --eval-tokens 4096)
  short=(--time-budget 1 --eval-tokens 4096)
  agree=(--scalar-lr 0 --steps 3 --eval-tokens 4096)
  full=("${agree[@]}")
fi
run() { # NAME LIMIT OPS ARGUMENTS...
  local name=$1 limit=$2 ops=$3
  shift 3
  rm -rf "${OUT:?}/$name"
  part "$name" "$limit" "$PY" -m train --data "$data" --ops "$ops" --run-dir "$OUT/$name" "$@"
}

run run-triton 210 "${ops[0]}" "${long[@]}"
run agree-triton 45 "${ops[0]}" "${agree[@]}"
run agree-reference 50 "${ops[2]}" "${agree[@]}"
run full-triton 45 "${ops[0]}" "${full[@]}"
part profile 45 "$PY" -m bench.profile --ops "${ops[0]}" --rows 30 --save "$OUT/trace.json"
run run-reference 65 "${ops[2]}" "${short[@]}"
# It compiles for some two minutes: the step, the update, the evaluation, the audit's shapes.
run run-compile 260 "${ops[1]}" "${long[@]}"
part agreement 10 "$PY" -m bench.runs --agree -- "$OUT"/agree-*/
part table 10 "$PY" -m bench.runs "$OUT"/run-*/
run full-compile 60 "${ops[1]}" "${full[@]}"
part agreement-compile 10 "$PY" -m bench.runs --agree -- "$OUT"/full-*/

echo
cat "$OUT"/{profile,agreement,agreement-compile,table}.log
finish
