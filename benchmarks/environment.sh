#!/usr/bin/env bash
# Makes .venv-bench: an environment with the peers that the benchmarks compare with (OpenCLIP,
# webdataset, torch.compile) and this project as a wheel, all on one torch. OpenCLIP needs
# torchvision, which the project does not. torch here is the CUDA build (5.6 GB installed), which
# also runs on a CPU. What measures and draws is pyproject.toml's extra `bench`.
# Run it again after changing the source: only the project is installed anew.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.venv-bench
pinned=(torch==2.14.1 torchvision==0.29.1)
peers=(open_clip_torch==3.3.0 pytest==9.2.0)
build_tools=("setuptools>=77" wheel ninja)
needed_kb=$((14 * 1024 * 1024))

if [ ! -x "$environment/bin/python" ]; then
  free_kb=$(df --output=avail -k . | tail -n 1)
  if [ "$free_kb" -lt "$needed_kb" ]; then
    echo "bench-env needs 14 GB of free disk here, $((free_kb / 1024 / 1024)) GB are free" >&2
    exit 1
  fi
  "${PYTHON:-python3}" -m venv "$environment"
fi
# Without a driver no CUDA operator could run: don't spend minutes on compiling them.
if ! command -v nvidia-smi >/dev/null; then
  export CMAKE_ARGS="${CMAKE_ARGS:-} -DCARILLON_CUDA=OFF"
fi
export PATH="$PWD/$environment/bin:$PATH"
pip=("$environment/bin/python" -m pip --disable-pip-version-check)
dependencies=$("$environment/bin/python" - <<'PYTHON'
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["bench"]))
PYTHON
)
mapfile -t dependencies <<<"$dependencies"
"${pip[@]}" install "${pinned[@]}" "${peers[@]}" "${build_tools[@]}" "${dependencies[@]}"
# As a wheel, not editable: the editable module in src/ belongs to the torch of .venv.
"${pip[@]}" install --no-build-isolation --no-deps --force-reinstall .
"$environment/bin/python" -c 'import carillon, open_clip, torch, webdataset
print(f"{carillon.__version__=} {open_clip.__version__=} {torch.__version__=}")'
