#!/usr/bin/env bash
# The first thing to run where there is a GPU: are the kernels right there, and how fast? What the machine has, tests of
# correctness, ceilings, a whole step against its roofline, every op by every provider. Under 8 minutes, whatever happens.
#
#   bench/first_light.sh                 OUT=folder PY=python DEADLINE=seconds
#   DEVICE=cpu bench/first_light.sh      the same parts on a CPU, small: does this script work?
set -uo pipefail
cd "$(dirname "$0")/.."
source bench/parts.sh
require_device

tests=(-m bench.gpu_tests)
ops=(bench/test_ops.py --benchmark-only --bench-seconds 110 -vv)
if [ "$DEVICE" = cpu ]; then
  tests+=(tests/prepare/test_loader.py)
  ops+=(-k "rms_norm or none")
fi

# Triton compiles its launchers, and torch.compile much, with a C compiler and Python's headers. The first import of
# PyTorch on a new machine reads gigabytes: it is paid here.
part machine 60 bash -c 'nvidia-smi; ${CC:-cc} --version | head -n 1; "$0" -c "
import os, sysconfig, torch, triton
header = os.path.join(sysconfig.get_paths()[\"include\"], \"Python.h\")
print(header, \"is there\" if os.path.exists(header) else \"is MISSING\")
print(\"torch\", torch.__version__, \"triton\", triton.__version__, \"cuda\", torch.cuda.is_available())"' "$PY"
part tests 140 "$PY" "${tests[@]}"
part ceilings 30 "$PY" -m bench.ceilings --json "$OUT/ceilings.json"
part step 140 "$PY" -m pytest bench/test_step.py --benchmark-only -vv --benchmark-json "$OUT/step.json"
part roofline 15 "$PY" -m bench.roofline --measured "$OUT/step.json"
part ops 150 "$PY" -m pytest "${ops[@]}" --benchmark-json "$OUT/ops.json"
if [ "$DEVICE" = cuda ]; then
  part regressions 15 "$PY" -m bench.regressions "$OUT/ops.json"
fi

echo
sed -n '/= ops on /,$p' "$OUT/ops.log" | cut -c1-150 | head -n 60
cat "$OUT/roofline.log"
finish
