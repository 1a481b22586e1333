#!/usr/bin/env bash
# Everything that only a GPU can tell: builds the extension for the GPU present, runs the operator tests on it, the
# sanitizer on a few of them, then the benchmarks. Needs CUDA, torch, triton, pytest, hypothesis; no network.
#
#   scripts/gpu_check.sh [RESULTS]      every output as a file in RESULTS (default: build/gpu_check)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-build/gpu_check}
mkdir -p "$results"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
failed=0

step() {  # step NAME SECONDS COMMAND...: runs it, keeps its output, says how it went
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  if timeout "$limit" "$@" > "$results/$name.log" 2>&1; then
    echo "ok     $name ($((SECONDS - started)) s)"
  else
    echo "FAILED $name ($((SECONDS - started)) s), see $results/$name.log:"
    tail -n 15 "$results/$name.log"
    failed=1
  fi
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$results/environment.log"
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' | tee -a "$results/environment.log"
step build 300 "$python" setup.py build_ext --inplace
[ $failed = 0 ] || exit 1

operators=(tests/test_append_kv.py tests/test_decode_attention.py tests/test_gather_kv.py tests/test_transform_rows.py)
step tests 240 "$python" -m pytest -q -p no:cacheprovider "${operators[@]}" -k cuda
tail -n 1 "$results/tests.log"
for tool in memcheck racecheck; do
  step "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" scripts/gpu_smoke.py
done
for op in decode append gather; do
  step "bench_$op" 240 "$python" scripts/bench_kernels.py --op "$op" --device cuda --seconds 0.3 --json "$results/bench_$op.json"
  cat "$results/bench_$op.log"
done
exit $failed
