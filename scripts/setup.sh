#!/usr/bin/env bash
# Sets up one virtual environment per SGLang version under .venv/ and builds saw-int4 into it.
#
#   scripts/setup.sh [SGLANG_VERSION]      prints the environment's python on standard output
#
# Safe to interrupt and to repeat: each finished step leaves a stamp, and only what is missing or changed is done.
# With an NVIDIA GPU and nvcc it installs SGLang's ordinary CUDA packages; otherwise the subset that a CPU needs.
#
#   PYTHON=...               interpreter to build the environment from (default: python3.11, else python3)
#   SAW_INT4_CPU_ONLY=1      ignore GPU and nvcc
#   SAW_INT4_TORCH_INDEX=URL extra package index to take a CPU build of torch from
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:-0.5.23}
torch_cpu=2.13.0
torchvision_cpu=0.28.0
venv="$PWD/.venv/sglang-$version"
stamps="$venv/.stamps"
log="$PWD/.cache/setup-$version.log"
mkdir -p .venv .cache

say() { printf '[setup %s] %s\n' "$version" "$*" >&2; }
die() { say "$1"; say "way out: $2"; exit 1; }

if command -v flock >/dev/null; then
  exec 9>.cache/setup.lock
  flock -n 9 || { say "another set-up is running; waiting for it"; flock 9; }
fi

# ---- what the machine must bring ---------------------------------------------------------------------------------
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
[ -n "$python" ] || die "no python3 found" "install Python 3.11, or set PYTHON to an interpreter"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
  die "$python is $("$python" -V 2>&1), expected Python 3.10 to 3.13" "set PYTHON to another interpreter"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  die "$python has no venv module" "install it (Debian, Ubuntu: apt-get install python3-venv)"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || die "Python's C headers are missing ($header)" "install them (Debian, Ubuntu: apt-get install python3-dev)"
printf '#include <compare>\n#include <omp.h>\nint main() { return (1 <=> 2) == 0; }\n' |
  ${CXX:-g++} -std=c++20 -fopenmp -x c++ - -o /dev/null 2>/dev/null ||
  die "${CXX:-g++} cannot compile C++20 with OpenMP" "install GCC 10 or newer (apt-get install g++), or set CXX"

mode=cpu
if [ "${SAW_INT4_CPU_ONLY:-0}" != 1 ] && nvidia-smi -L >/dev/null 2>&1 && command -v nvcc >/dev/null; then
  mode=cuda
else
  export SAW_INT4_CPU_ONLY=1  # nvcc alone is no reason: PyPI's torch is a CUDA build on machines without a GPU too
fi
extra="requirements/sglang-$version-cpu.txt"
[ -f "$extra" ] || die "SGLang $version is not supported, expected one of: $(cd requirements && echo sglang-*-cpu.txt | sed 's/sglang-//g; s/-cpu.txt//g')" \
  "call scripts/setup.sh with one of these"

# ---- steps -------------------------------------------------------------------------------------------------------
hash_of() { cat "$@" | sha256sum | cut -c1-12; }

# step NAME KEY COMMAND...: run once for each KEY.
step() {
  local name=$1 key=$2 started=$SECONDS
  shift 2
  [ -f "$stamps/$name-$key" ] && return
  say "$name ..."
  if ! "$@" >>"$log" 2>&1 9>&-; then
    tail -n 25 "$log" >&2
    die "step '$name' failed; the end of $log is above" "fix what it names and run this again: finished steps are kept"
  fi
  rm -f "$stamps/$name-"*
  touch "$stamps/$name-$key"
  say "$name done in $((SECONDS - started)) s"
}

make_venv() { "$python" -m venv --clear "$venv" && mkdir -p "$stamps"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install "$@"; }
torch_index=()
[ -z "${SAW_INT4_TORCH_INDEX:-}" ] || torch_index=(--extra-index-url "$SAW_INT4_TORCH_INDEX")
install_torch() { pip "torch==$torch_cpu" "${torch_index[@]}"; }
install_build_tools() { pip 'setuptools>=77,<82' wheel ninja numpy; }
install_sglang_cpu() {
  pip -r requirements/cpu.txt -r "$extra" "torch==$torch_cpu" "${torch_index[@]}" &&
    pip --no-deps "sglang==$version" "torchvision==$torchvision_cpu"
}
build_extension() { MAX_JOBS=${MAX_JOBS:-$(nproc)} "$venv/bin/python" setup.py build_ext --inplace; }
install_project() { SAW_INT4_NO_EXTENSION=1 pip --no-build-isolation --no-deps -e .; }

step environment "$(hash_of <("$python" -V))" make_venv
if [ "$mode" = cuda ]; then
  step sglang "$version-cuda" pip "sglang==$version"
  step build-tools 1 install_build_tools
else
  step torch "$torch_cpu" install_torch
  step build-tools 1 install_build_tools
  step sglang "$version-$(hash_of requirements/cpu.txt "$extra")" install_sglang_cpu
fi
step test-tools "$(hash_of requirements/dev.txt)" pip -r requirements/dev.txt
# The extension lies in the tree: environments of one Python and torch share it.
mapfile -t sources < <(find csrc setup.py -type f | sort)
versions=$("$venv/bin/python" -c 'import sys; from importlib.metadata import version; print(sys.version, version("torch"))')
stamps="$PWD/.cache" step extension "$(hash_of "${sources[@]}" <(echo "$mode $versions"))" build_extension
step saw-int4 "$(hash_of setup.py pyproject.toml)" install_project

say "ready ($mode)"
echo "$venv/bin/python"
