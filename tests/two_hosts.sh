#!/usr/bin/env bash
# Two hosts, as far as one machine can be two: network namespaces with an address each and a cable between them, and
# torchrun across it. By hand, as root, with iproute2: tests/two_hosts.sh [FOLDER]
#
# 1. A run over both writes the very weights that a run by itself writes.
# 2. The cable is cut in mid-run: both sides end with a line, within the timeout.
# 3. With the cable back, the run goes on to the same weights.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
scratch=${1:-$(mktemp -d)}
timeout=10 # seconds, of the watchdog
mkdir -p "$scratch"

end() {
    pkill -KILL -f "rdzv-id timebox-two-hosts" || true
    for host in a b; do ip netns del "timebox-$host" 2>/dev/null || true; done
}
trap end EXIT

for host in a b; do
    ip netns add "timebox-$host"
    ip -n "timebox-$host" link set lo up
done
ip link add cable netns timebox-a type veth peer name cable netns timebox-b
ip -n timebox-a addr add 10.77.0.1/24 dev cable
ip -n timebox-b addr add 10.77.0.2/24 dev cable
for host in a b; do ip -n "timebox-$host" link set cable up; done

options=(--device cpu --steps 30 --untimed-steps 2 --device-batch-size 2 --eval-tokens 4096 --keep-checkpoints)

# on HOST ADDRESS LOG ARGUMENTS: one side of a run over both.
on() {
    local host=$1 address=$2 log=$3
    shift 3
    ip netns exec "timebox-$host" env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=cable \
        "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d \
        --rdzv-endpoint 10.77.0.1:29400 --rdzv-conf "is_host=$([[ $host = a ]] && echo 1 || echo 0)" \
        --rdzv-id timebox-two-hosts --local-addr "$address" \
        -m train "$@" >"$scratch/$log-$host.log" 2>&1
}

# both LOG ARGUMENTS: both sides, to their end.
both() {
    on b 10.77.0.2 "$@" &
    on a 10.77.0.1 "$@"
    wait
}

echo "one process"
OMP_NUM_THREADS=1 "$python" -m train "${options[@]}" --run-dir "$scratch/one" >"$scratch/one.log" 2>&1

echo "two hosts"
both whole "${options[@]}" --run-dir "$scratch/two"
cmp "$scratch/one/model.safetensors" "$scratch/two/model.safetensors"
echo "the same weights, byte for byte"

echo "two hosts, and the cable is cut after ten steps"
on b 10.77.0.2 cut "${options[@]}" --run-dir "$scratch/cut" --checkpoint-every 0 --hang-timeout "$timeout" || true &
on a 10.77.0.1 cut "${options[@]}" --run-dir "$scratch/cut" --checkpoint-every 0 --hang-timeout "$timeout" || true &
until grep -q "^step 00010" "$scratch/cut-a.log" 2>/dev/null; do sleep 0.1; done
ip -n timebox-a link set cable down
cut=$(date +%s.%N)
for host in a b; do
    until grep -q "^FAIL" "$scratch/cut-$host.log"; do
        sleep 0.1
        if (($(date +%s) > ${cut%.*} + 4 * timeout)); then
            echo "no line on $host after $((4 * timeout)) s"
            exit 1
        fi
    done
    echo "on $host after $(echo "$(date +%s.%N) - $cut" | bc) s: $(grep "^FAIL" "$scratch/cut-$host.log")"
done
pkill -KILL -f "rdzv-id timebox-two-hosts" || true # torchrun itself still asks for the other side
wait 2>/dev/null
ip -n timebox-a link set cable up

echo "the cable is back"
both resumed --resume "$scratch/cut"
cmp "$scratch/one/model.safetensors" "$scratch/cut/model.safetensors"
echo "the same weights, byte for byte"
