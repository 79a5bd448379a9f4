#!/usr/bin/env bash
# The first half hour on a machine with a GPU, in stages that each end within nine minutes:
#
#     scripts/gpu_first_half_hour.sh STAGE
#
# Stages run in the order of STAGES below; each says what it found and which one is next. They use
# the Python that GPU_PYTHON names (default: python3), install nothing and need no network. Tables,
# logs and the list of tests that failed go to the folder RESULTS (default: bench/results).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

STAGES=(build smoke kernels graphs retry sanitize table decode trio)
PYTHON=${GPU_PYTHON:-python3}
RESULTS=${RESULTS:-bench/results}
LIMIT=520 # seconds a stage

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

# Ends what is left of the stage when its time is over; tests and benches keep what they have then.
run() {
    echo "+ $*"
    timeout --signal=INT --kill-after=15 $((LIMIT > SECONDS ? LIMIT - SECONDS : 1)) "$@"
}

# The tests that failed are remembered from stage to stage, for `retry`.
run_tests() {
    run "$PYTHON" -m pytest -q -o "cache_dir=$RESULTS/first-half-hour-cache" "$@"
}

build() {
    run make gpu-build "GPU_PYTHON=$PYTHON"
}

# Versions, libraries, every kernel against its reference once, a small decode with graphs.
# Warnings are errors.
smoke() {
    run "$PYTHON" -m tq_fast info &&
        run_tests -W error --maxfail 20 tests/gpu/test_kernels.py -k agrees_with_the_reference &&
        run_tests -W error tests/gpu/test_trio.py \
            -k "test_fp32_gives_the_tokens_of_the_cpu and sft and graphs"
}

kernels() {
    run_tests tests/gpu/test_kernels.py
    local failed=$?
    run_tests tests/ops -k "cuda or triton" || failed=1
    return "$failed"
}

graphs() {
    run_tests tests/gpu/test_trio.py tests/gpu/test_rollout_graphs.py
}

# Only what failed, with launches that report an error where it happens.
retry() {
    CUDA_LAUNCH_BLOCKING=1 run_tests --last-failed --last-failed-no-failures none tests/gpu tests/ops
    local failed=$?
    # pytest ends with 5 where no test was left to run.
    [ "$failed" = 5 ] || return "$failed"
}

# memcheck, then racecheck, whose findings are no failure.
sanitize() {
    run make --old-file=gpu-build gpu-sanitize "GPU_PYTHON=$PYTHON"
}

table() {
    run "$PYTHON" -m bench.gpu_table "$RESULTS"
}

decode() {
    run "$PYTHON" -m bench.gpu_decode "$RESULTS"
}

trio() {
    run "$PYTHON" -m bench.gpu_trio "$RESULTS"
}

next_after() {
    local i
    for i in "${!STAGES[@]}"; do
        if [ "${STAGES[i]}" = "$1" ]; then
            echo "${STAGES[i + 1]:-}"
        fi
    done
}

stage=${1:-}
known=
for name in "${STAGES[@]}"; do
    [ "$name" != "$stage" ] || known=yes
done
if [ -z "$known" ]; then
    echo "usage: $0 STAGE, one of: ${STAGES[*]}" >&2
    exit 2
fi
mkdir -p "$RESULTS"
log="$RESULTS/first-half-hour-$stage.log"
"$stage" 2>&1 | tee "$log"
failed=$?

echo
echo "== $stage: $([ "$failed" = 0 ] && echo passed || echo "failed with exit code $failed") after" \
    "$SECONDS s; what it said is in $log"
[ "$failed" != 124 ] || echo "== it ran out of its $LIMIT s"
grep -E "^(FAILED|ERROR)|[0-9]+ (passed|failed|error|deselected)|rows failed" "$log" | tail -n 25
next=$(next_after "$stage")
case "$failed-$stage-$next" in
0-*-) echo "== that was the last stage; the tables are in $RESULTS" ;;
0-*) echo "== next: $0 $next" ;;
*-build-*) echo "== next: mend the build, then $0 build" ;;
*-kernels-* | *-graphs-*) echo "== next: $0 $next, and mend what failed before $0 retry" ;;
*) echo "== next: mend what failed and run $0 $stage again, or go on with $0 ${next:-build}" ;;
esac
exit "$failed"
