#!/usr/bin/env bash
# Sets up everything, then runs all tests: style, operators, emulated CUDA kernels, and both supported SGLang versions.
#
#   scripts/test.sh              everything
#   scripts/test.sh ARGS...      only pytest on SGLang 0.5.23, with ARGS (as: scripts/test.sh tests/test_format.py -k golden)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(scripts/setup.sh 0.5.23)
export OMP_WAIT_POLICY=passive  # threads of several processes share the cores; spinning ones starve each other
export SAW_INT4_TEST_MODEL=$("$python" scripts/prepare_model.py)
if [ $# -gt 0 ]; then
  exec "$python" -m pytest "$@"
fi
bin=$(dirname "$python")
"$bin/ruff" check .
"$bin/ruff" format --check .
git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs "$bin/clang-format" --dry-run --Werror

# Tests of servers wait for most of their time, so two streams share the machine: servers on SGLang 0.5.23 here, and
# beside them, shown at the end, everything without servers and then SGLang 0.5.21.
beside() {
  local failed=0 second
  second=$(scripts/setup.sh 0.5.21) || return 1
  "$python" -m pytest --ignore tests/integration || failed=1
  "$second" -m pytest -m both_versions tests/integration || failed=1
  return $failed
}
beside >.cache/beside.log 2>&1 &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

failed=0
"$python" -m pytest -m "not by_hand" tests/integration || failed=1
wait $! || failed=1
cat .cache/beside.log
exit $failed
