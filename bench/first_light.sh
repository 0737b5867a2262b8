#!/usr/bin/env bash
# The first thing to run where there is a GPU: are the kernels right there, and how fast? Correctness tests, ceilings,
# every op by every provider, a whole step against its roofline. Under 8 minutes, whatever happens.
#
#   bench/first_light.sh                 OUT=folder PY=python DEADLINE=seconds
#   DEVICE=cpu bench/first_light.sh      the same parts on a CPU, small: does this script work?
set -uo pipefail
cd "$(dirname "$0")/.."
source bench/parts.sh

ops=(bench/test_ops.py --benchmark-only --bench-seconds 130)
if [ "$DEVICE" = cpu ]; then
  ops+=(-k "norm or none")
fi

part tests 150 "$PY" -m pytest tests -m gpu
part ceilings 30 "$PY" -m bench.ceilings --json "$OUT/ceilings.json"
part ops 175 "$PY" -m pytest "${ops[@]}" --benchmark-json "$OUT/ops.json"
part step 85 "$PY" -m pytest bench/test_step.py --benchmark-only --benchmark-json "$OUT/step.json"
part roofline 15 "$PY" -m bench.roofline --measured "$OUT/step.json"
if [ "$DEVICE" = cuda ]; then
  part compare 15 "$PY" -m bench.compare "$OUT/ops.json"
fi

echo
sed -n '/= ops on /,$p' "$OUT/ops.log" | cut -c1-150 | head -n 60
cat "$OUT/roofline.log"
finish
