#!/usr/bin/env bash
# Everything that only a GPU can tell: builds the extension for the GPU present, runs the operator tests on it, the
# sanitizer on a few of them, then the benchmarks. Needs CUDA, torch, triton, pytest, hypothesis; no network. pytest-xdist
# makes the tests quicker; FlashInfer and SGLang, where they are installed, are baselines.
#
#   scripts/gpu_check.sh [RESULTS]      every output as a file in RESULTS (default: build/gpu_check)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-build/gpu_check}
mkdir -p "$results"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export OMP_NUM_THREADS=2  # of each of eight test workers
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
workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 8")
# shellcheck disable=SC2086  # no worker option at all without xdist
step tests 240 "$python" -m pytest -q -p no:cacheprovider $workers "${operators[@]}" -k "cuda or captured"
tail -n 1 "$results/tests.log"
for tool in memcheck racecheck; do
  step "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" scripts/gpu_smoke.py
done
bench() {  # bench NAME ARGUMENTS...: one table
  local name=$1
  shift
  step "$name" 240 "$python" scripts/bench_kernels.py --device cuda --seconds 0.2 --json "$results/$name.json" "$@"
  cat "$results/$name.log"
}
bench decode --op decode --head-dims 128
bench decode_rows --op decode --head-dims 128 --batches 8 64 --contexts 16384 --q-rows 1 2 4 8 --no-flashinfer
bench decode_dims --op decode --head-dims 64 256 --contexts 1024 4096 16384 --no-flashinfer
bench append --op append --head-dims 64 128 256
bench gather --op gather --head-dims 64 128 256
exit $failed
