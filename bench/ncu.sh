#!/usr/bin/env bash
# Nsight Compute over single launches: bench/ncu.sh DIRECTORY CASE:KERNEL ...; a summary to stdout, SASS with samples to files.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
out=$1
shift
metrics='gpu__time_duration.sum|dram__throughput.avg.pct_of_peak_sustained_elapsed|dram__bytes_read.sum |lts__t_sectors_op_read.sum |sm__warps_active.avg.pct_of_peak_sustained_active|smsp__inst_executed.sum |smsp__issue_active.avg.pct_of_peak_sustained_active|launch__registers_per_thread |launch__grid_size|smsp__average_warps_issue_stalled_.*per_issue_active|local_op|local.sum|sectors_per_request|data_bank_conflicts_pipe_lsu.sum |uncoalesced'
for pair in "$@"; do
    case=${pair%%:*} kernel=${pair##*:} name=$(printf '%s' "${pair#*/}" | tr '/:' '__')
    ncu --clock-control none ${NCU_FLAGS:-} --set full --import-source no -k "regex:^$kernel" -s 3 -c 1 -f -o "$out/$name" \
        "${PYTHON:-python3}" -m bench.ncu_case "$case" "$kernel" >"$out/$name.log" 2>&1 || tail -n 5 "$out/$name.log"
    printf '\n== %s\n' "$pair"
    ncu --import "$out/$name.ncu-rep" --page raw | grep -E "$metrics" | grep -v ' 0 *$' | sed 's/  */ /g'
    ncu --import "$out/$name.ncu-rep" --page source --csv >"$out/$name.csv" 2>/dev/null
    rm -f "$out/$name.ncu-rep" "$out/$name.log"
done
