#!/usr/bin/env bash
# Builds the CPU operators with AddressSanitizer and UBSan, proves that both see faults, and runs the
# operators' tests; any report ends the run. Needs GCC, whose runtime is loaded before Python.
# The module is loaded from a package in the build folder: src/carillon keeps its own.
# Left out: Triton's interpreter, where no code of csrc runs, and the two tests that run compilers.
# Leaks are not looked for: Python leaves much at its end.
# Arguments: the Python to use, then pytest's, instead of all tests.
set -euo pipefail
python=$(realpath -s "$1")
shift
cd "$(dirname "$0")/../../.."
read -r torch prefix < <("$python" -c \
  'import torch; print(torch.__version__, torch.utils.cmake_prefix_path)')
folder=$PWD/build/asan-$torch
cmake -S . -B "$folder" -DCARILLON_SANITIZE=ON -DCARILLON_CUDA=OFF \
  -DCMAKE_PREFIX_PATH="$prefix" -DPython_EXECUTABLE="$python"
cmake --build "$folder" --parallel "$(nproc)"

export PYTHONPATH=$folder/package
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
runtime="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
if [[ $# -eq 0 ]]; then
  LD_PRELOAD=$runtime "$python" -m pytest tests/kernels/sanitizers/prove_sanitizers.py
  set -- tests/kernels -k "not triton" --ignore=tests/kernels/test_compile_report.py \
    --ignore=tests/kernels/test_add_a_kernel.py
fi
# A report goes to the terminal even though the process ends before pytest shows what it caught.
LD_PRELOAD=$runtime "$python" -m pytest --capture=sys "$@"
