#!/usr/bin/env bash
# Everything that only a GPU can show: bench/on_gpu.sh [DIRECTORY FOR LOGS AND JSON [GROUP...]]
# Groups: tests, sanitizers, bench, soak, sdc; all if none is named. Each takes less than ten minutes on one H100.
# Runs from a checkout, without installing it. Ends with a table; the exit status is the number of failed parts.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${1:-$(mktemp -d)}
mkdir -p "$out"
groups=${*:2}
failed=0
table=""

part() { # NAME COMMAND...
    local name=$1 start=$SECONDS status=0
    shift
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    table+=$(printf '%-22s %-6s %4d s' "$name" "$([ "$status" -eq 0 ] && echo ok || echo "FAIL $status")" $((SECONDS - start)))$'\n'
}

is_chosen() { [ -z "$groups" ] || [[ " $groups " == *" $1 "* ]]; }

part versions "$python" -c 'import cupy, cuda.core, numpy, sys; r = cupy.cuda.runtime
print(sys.version.split()[0], "cupy", cupy.__version__, "cuda.core", cuda.core.__version__, "numpy", numpy.__version__)
print(r.getDeviceProperties(0)["name"].decode(), "driver", r.driverGetVersion(), "runtime", r.runtimeGetVersion())'

if is_chosen tests; then
    part doctor "$python" -m kvcanary doctor
    for fault in none bit-flip stale-table lost-write; do
        part "demo-$fault" "$python" -m kvcanary demo --backend cuda --fault "$fault" --json "$out/demo-$fault.json"
    done
    part drill "$python" -m kvcanary drill --backend cuda --json "$out/drill.json"
    part drill-beside env KVCANARY_OVERLAP_HEAD=1 "$python" -m kvcanary drill --backend cuda --json "$out/drill-beside.json"
    part pytest-gpu "$python" -m pytest -q -m gpu -p no:cacheprovider -s
fi

if is_chosen sanitizers; then
    if command -v compute-sanitizer >/dev/null; then
        # Without a pool: CuPy's would hide an access beyond one array in the next one. API errors are left out: cuda.bindings
        # probes the driver for symbols that this one does not have, which is no access to memory.
        for tool in memcheck racecheck synccheck initcheck; do
            part "$tool" env KVC_TEST_NO_POOL=1 timeout 240 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
                "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu -k "memcheck or silent_and_then_find or sweep or prove"
        done
    else
        printf '\ncompute-sanitizer is not on the PATH: its tools are left out\n'
    fi
fi

if is_chosen bench; then
    part bench-replay "$python" bench/bench_replay.py --json "$out/bench_replay.json"
    part bench-step "$python" bench/bench_step.py --json "$out/bench_step.json"
    part bench-host "$python" bench/bench_host.py --json "$out/bench_host.json"
    part bench-launch "$python" bench/bench_launch.py
    part bench-lifecycle "$python" bench/bench_lifecycle.py --json "$out/bench_lifecycle.json"
    part bench-kernels "$python" -m bench --out "$out"
fi

if is_chosen soak; then # an honest engine of all habits; SOAK_STEPS=1000000 for the campaign
    part soak "$python" -m kvcanary drill --soak --backend cuda --steps "${SOAK_STEPS:-100000}" --processes "$(($(nproc) - 2))"
fi

if is_chosen sdc; then
    part sdc "$python" -m kvcanary drill --backend cuda --scenario C24-bit --sdc "${SDC_RUNS:-1000000}" --json "$out/sdc.json"
fi

printf '\n%s' "$table"
exit "$failed"
