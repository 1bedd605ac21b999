#!/usr/bin/env bash
# Builds the native module for this machine's Python and torch, and puts the package together in
# WORK/site: links to the sources, so that nothing is installed and no dependency is asked for.
# Two builds run side by side: with the CUDA operators for sm_90a, and without. Triton's operators
# take their schemas from the module, so a CUDA source that does not compile must not cost them.
#   build.sh WORK DEVICE RECORDS [BUILT]
set -uo pipefail
work=$1 device=$2 records=$3 built=${4:-}
seconds=${STAGE_SECONDS:-600}
cuda="-DCARILLON_CUDA=ON -DCARILLON_CUDA_ARCHITECTURES=90a-real"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
package=$work/site/carillon

mkdir -p "$package"
cp "$root/src/carillon/__init__.py" "$package/"
for folder in kernels engine; do
  ln -sfn "$root/$folder" "$package/$folder"
done

# build KIND OPTIONS...: into WORK/build-KIND/_C.so
build() {
  local kind=$1 generator=(-G "Unix Makefiles")
  shift
  ! command -v ninja >/dev/null || generator=(-G Ninja)
  cmake -S "$root" -B "$work/build-$kind" "${generator[@]}" "-DCMAKE_PREFIX_PATH=$prefix" \
    "-DPython_EXECUTABLE=$executable" "$@" &&
    cmake --build "$work/build-$kind" --parallel "$(nproc)"
}

# take MODULE KIND: the module, if it loads.
take() {
  local with_cuda
  cp "$1" "$package/_C.so" &&
    with_cuda=$(PYTHONPATH=$work/site "$PYTHON" -c 'from carillon.kernels.table import load_native; print(load_native())') &&
    printf '{"event": "build", "module": "%s", "with_cuda": "%s"}\n' "$2" "$with_cuda" >>"$records"
}

if [ -n "$built" ]; then
  take "$built" given
  exit
fi
prefix=$("$PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)') || exit
executable=$("$PYTHON" -c 'import sys; print(sys.executable)') || exit
export -f build
export work root prefix executable
# `timeout` leads a process group of its own: ending it ends the compilers too.
timeout "$seconds" bash -c 'build plain -DCARILLON_CUDA=OFF' >"$work/logs/build-plain.log" 2>&1 &
plain=$!
trap 'kill "$plain" 2>/dev/null' EXIT
trap 'exit 143' TERM
if [ "$device" != cpu ]; then
  # A little less than the stage has, so that the other module can still be taken.
  if timeout "$((seconds - 20))" bash -c "build cuda $cuda" && take "$work/build-cuda/_C.so" cuda; then
    exit 0
  fi
  echo "build.sh: the module with CUDA operators failed (above); taking the one without"
fi
wait "$plain"
cat "$work/logs/build-plain.log"
take "$work/build-plain/_C.so" plain || exit 1
[ "$device" = cpu ] # without CUDA operators the stage has failed on a GPU
