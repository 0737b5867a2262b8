# To be sourced: runs the parts of a long measurement one after the other inside one limit, whatever fails, and says at
# the end how each went. $OUT takes a log for each part, $DEADLINE (seconds from now) ends them all.
PY=${PY:-.venv/bin/python}
DEADLINE=${DEADLINE:-470}
DEVICE=${DEVICE:-cuda}
# A folder of its own, whoever else begins in this second: what was measured before stays to be compared with.
mkdir -p "${OUT:-bench/results}"
OUT=${OUT:-$(mktemp -d "bench/results/$(date +%Y%m%d-%H%M%S)-XXX")}
SECONDS=0
rows=()
failures=0
if [ "$DEVICE" = cpu ]; then
  export CUDA_VISIBLE_DEVICES=
fi

# Ends the script where what it measures is not there.
require_device() {
  if [ "$DEVICE" = cuda ] && ! "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no CUDA device here: DEVICE=cpu takes the same parts on a CPU, small" >&2
    exit 2
  fi
}

# part NAME LIMIT COMMAND...: at most LIMIT seconds, and never past the deadline.
part() {
  local name=$1 limit=$2 start=$SECONDS code=0 state
  shift 2
  local left=$((DEADLINE - SECONDS))
  if [ "$left" -lt 5 ]; then
    rows+=("$name|no time left|0|")
    failures=$((failures + 1))
    return
  fi
  echo "== $name: $*"
  # An interrupt first: pytest then still writes its JSON, and a training run closes its files.
  timeout --signal=INT --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  case $code in
    0) state=ok ;;
    124 | 137) state="timed out" ;;
    *) state="FAILED ($code)" ;;
  esac
  [ "$code" = 0 ] || failures=$((failures + 1))
  tail -n 3 "$OUT/$name.log"
  rows+=("$name|$state|$((SECONDS - start))|$(grep -v '^ *$' "$OUT/$name.log" | tail -n 1 | cut -c1-80)")
}

# The table, last of all; the exit code says whether every part was well.
finish() {
  printf '\n%-20s %-12s %4s  %s\n' part state s 'last line of its log'
  local row name state seconds last
  for row in "${rows[@]}"; do
    IFS='|' read -r name state seconds last <<<"$row"
    printf '%-20s %-12s %4s  %s\n' "$name" "$state" "$seconds" "$last"
  done
  echo "${#rows[@]} parts, $failures not well, $SECONDS s; logs and JSON in $OUT"
  [ "$failures" = 0 ]
}
