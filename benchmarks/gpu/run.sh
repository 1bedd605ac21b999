#!/usr/bin/env bash
# The GPU suite in one call, without a network: builds the extension, checks every provider, times
# each operator against its bars, peers and roofline, times training steps, and runs the GPU tests.
# docs/gpu-status.md says how its results are kept.
#
#   run.sh [options] OUTDIR
#   run.sh --profile OP[:CASE[:SIDE]] [options] OUTDIR
#
#   --seconds N     the time for all of it (540)
#   --wheels DIR    wheels of what the machine lacks (CARILLON_WHEELS, or wheels/ in the checkout)
#   --list-wheels   prints which wheels are taken, and ends
#   --dry-run       tiny sizes on the CPU, to try the suite itself
#   --module FILE   a built _C module, in place of a build
#   --cases DIR     other descriptions of operators than cases/
#   --tests DIR     other tests than tests/kernels
#   --case-seconds N  the time for one side of a case, in place of each stage's own
#   PYTHON          the interpreter (python3)
#
# Every stage has a time budget, a log and a status, and none needs the success of another. OUTDIR
# gets five files: summary.md and summary.json, written anew after each stage, records.jsonl, which
# grows while stages run, logs.tar.gz, and profile.tar.gz in the second mode.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
seconds=540
reserve=12 # for the last summary
kept=0     # for the tests, which stand behind longer stages
wheels=${CARILLON_WHEELS:-$root/wheels}
cases=$here/cases
tests=$root/tests/kernels
device=cuda
case_seconds=
built=
profiled=
out=

fail() {
  echo "run.sh: $1" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) device=cpu ;;
    --list-wheels) exec cat "$here/wheels.txt" ;;
    --seconds | --wheels | --module | --cases | --tests | --case-seconds | --profile)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case $1 in
        --seconds) seconds=$2 ;;
        --wheels) wheels=$2 ;;
        --module) built=$2 ;;
        --cases) cases=$2 ;;
        --tests) tests=$2 ;;
        --case-seconds) case_seconds=$2 ;;
        --profile) profiled=$2 ;;
      esac
      shift
      ;;
    -*) fail "unknown option $1: the head of $here/run.sh lists them" ;;
    *)
      [ -z "$out" ] || fail "one OUTDIR is expected, got $out and $1"
      out=$1
      ;;
  esac
  shift
done
[ -n "$out" ] || fail "OUTDIR is missing: run.sh [options] OUTDIR"
[[ $seconds =~ ^[0-9]+$ ]] || fail "--seconds must be a whole number, got $seconds"
mkdir -p "$out" || fail "$out cannot be made"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
logs=$work/logs
records=$out/records.jsonl
rates=$work/rates.json
mkdir -p "$logs" "$work/profile"
rm -f "$out"/{summary.md,summary.json,records.jsonl,logs.tar.gz,profile.tar.gz}
child=

# Ours before whatever else is installed; caches in the folder that goes away.
export PYTHONPATH=$work/site:$work/wheels:$here:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
export PYTHONUNBUFFERED=1
[ "$device" = cpu ] || unset TRITON_INTERPRET

# What is known so far, for the case that nothing more follows. The shell's own summary stands in
# where Python cannot write one.
publish() {
  tar -C "$work" -czf "$out/logs.tar.gz" logs
  if ! timeout 20 "$python" "$here/summary.py" "$out" "$logs" >"$work/summary.log" 2>&1; then
    printf '# GPU suite\n\nThe summary failed; its stages and records follow.\n\n```\n' >"$out/summary.md"
    cat "$work/summary.log" "$records" >>"$out/summary.md" 2>/dev/null
    printf '```\n' >>"$out/summary.md"
    printf '{"failed": "summary.py; see summary.md and records.jsonl"}\n' >"$out/summary.json"
  fi
}

# shellcheck disable=SC2329 # the trap calls it
finish() {
  trap - EXIT TERM INT
  [ -z "$child" ] || kill "$child" 2>/dev/null
  publish
  cat "$out/summary.md"
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM INT

# stage NAME BUDGET COMMAND...: at most BUDGET seconds, or what is left.
stage() {
  local name=$1 budget=$2 left=$((seconds - reserve - kept - SECONDS)) began=$SECONDS code status
  shift 2
  [ "$budget" -le "$left" ] || budget=$left
  if [ "$budget" -lt 5 ]; then
    printf '{"event": "stage", "name": "%s", "status": "not run: the time was up"}\n' "$name" >>"$records"
    return 1
  fi
  printf '{"event": "stage", "name": "%s", "status": "begun"}\n' "$name" >>"$records"
  echo "== $name, at most $budget s" >&2
  # In the background, so that a signal to this script is heard at once.
  STAGE_SECONDS=$budget timeout --kill-after=5 "$budget" "$@" >"$logs/$name.log" 2>&1 &
  child=$!
  wait "$child"
  code=$?
  child=
  case $code in
    0) status=passed ;;
    124 | 137) status="timed out" ;;
    *) status=failed ;;
  esac
  printf '{"event": "stage", "name": "%s", "status": "%s", "code": %d, "seconds": %d, "budget_s": %d}\n' \
    "$name" "$status" "$code" $((SECONDS - began)) "$budget" >>"$records"
  publish
  return "$code"
}

# group NAME BUDGET SECONDS-A-CASE SECONDS-A-SIDE [OPTIONS]: one group of cases of all operators.
group() {
  local name=$1 budget=$2 case_s=$3 side_s=$4
  local modules=()
  shift 4
  # A module names its groups; a process that finds no case costs seconds.
  mapfile -t modules < <(grep -l "\"$name\"" "${operators[@]}")
  [ ${#modules[@]} -gt 0 ] || return 0
  [ "$device" != cpu ] || set -- --tiny "$@"
  # sweep.py and kernel_tests.py end a little before STAGE_SECONDS, to say what they did not reach.
  stage "$name" "$budget" \
    "$python" "$here/sweep.py" "${modules[@]}" --group "$name" --device "$device" \
    --records "$records" --logs "$logs" --rates "$rates" \
    --case-s "${case_seconds:-$case_s}" --side-s "$side_s" "$@"
}

operators=()
for name in contrastive packed_attention fp8_cast moe_routing grouped_mm image_normalize training; do
  [ ! -f "$cases/$name.py" ] || operators+=("$cases/$name.py")
done
for file in "$cases"/*.py; do
  [[ " ${operators[*]} " == *" $file "* ]] || operators+=("$file")
done

stage machine 20 "$python" "$here/machine.py" describe "$records"
stage wheels 40 "$python" "$here/wheels.py" "$here/wheels.txt" "$wheels" "$work/wheels" "$records"
stage build 200 env PYTHON="$python" bash "$here/build.sh" "$work" "$device" "$records" "$built"
if [ -n "$profiled" ]; then
  profile=("$python" "$here/profile_case.py" "$profiled" --cases "$cases" --device "$device" --out "$work/profile")
  [ "$device" != cpu ] || profile+=(--tiny)
  stage profile 120 "${profile[@]}" --by torch
  if command -v ncu >/dev/null; then
    # The card's clocks stay as they are.
    stage ncu 150 ncu --clock-control none --profile-from-start off --set detailed --force-overwrite \
      --target-processes all --launch-count 40 --export "$work/profile/ncu" "${profile[@]}" --by mark
    stage ncu-text 60 ncu --import "$work/profile/ncu.ncu-rep" --page details \
      --log-file "$work/profile/ncu.txt"
  elif command -v nsys >/dev/null; then
    stage nsys 150 nsys profile --capture-range cudaProfilerApi --force-overwrite true --stats true \
      --output "$work/profile/nsys" "${profile[@]}" --by mark
  fi
  tar -C "$work" -czf "$out/profile.tar.gz" profile
else
  stage rates 40 "$python" "$here/machine.py" rates "$records" "$rates" "$device"
  if [ "$device" = cpu ]; then
    group check 120 60 0.02 --at-once
    group bar 180 60 0.02
    group train 120 60 0.02
    stage tests 60 "$python" "$here/kernel_tests.py" "$tests" --records "$records" --logs "$logs" --marker ""
  else
    kept=100
    group check 80 60 0 --at-once
    group bar 170 60 0.5
    # A side that compiles takes most of a minute: what is left but for the million pairs and the
    # tests. Sides that were not reached say so.
    kept=160
    group train 300 70 2
    kept=100
    group long 60 45 1
    kept=0
    stage tests 180 "$python" "$here/kernel_tests.py" "$tests" --records "$records" --logs "$logs" --marker gpu
    group sweep 90 30 0.3
  fi
fi
exit 0
