#!/usr/bin/env bash
# The default tests in two processes of one thread each, of about as much work: most of them start programs or work on
# tiny tensors, where a second thread only waits. What the first process says is shown once the second is done.
#
#     tools/run_tests.sh PYTHON
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
first=(tests/kernels tests/families tests/checkpoint tests/adapt tests/planning tests/benchmarks
	tests/generation tests/layers tests/evaluation tests/objectives tests/placement)
log=$(mktemp)
"$1" -m pytest -p no:cacheprovider "${first[@]}" >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null; rm -f "$log"' EXIT
"$1" -m pytest "${first[@]/#/--ignore=}"
rest=$?
echo "--- ${first[*]}"
wait "$beside"
code=$?
cat "$log"
[ "$rest" -eq 0 ] && [ "$code" -eq 0 ]
