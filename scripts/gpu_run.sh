#!/usr/bin/env bash
# What is done where a CUDA device is at hand, in one command of at most nine minutes:
#
#   scripts/gpu_run.sh [OUTPUT]            the steps of scripts/gpu_plan.py, in its order
#   scripts/gpu_run.sh kernels [OUTPUT]    benchmarks of the Triton kernels alone
#   scripts/gpu_run.sh --dry-run           the plan with predicted seconds; needs no device
#
# Everything lands in OUTPUT (default out/gpu). Run again with the same OUTPUT it goes on where it
# stopped: steps that are done are skipped, records that are there are kept. Nothing is installed
# and no setting of the GPU is touched. LCCOST_GPU_SECONDS (520) bounds the whole, PYTHON names the
# interpreter, LCCOST_GPU the profile whose datasheet describes a GPU that has no profile itself.
# Exit: 0 done, or out of time with more to do (it says so); 1 something failed; 4 no device, or a
# package is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
LIMIT=${LCCOST_GPU_SECONDS:-520}
mode=all
case "${1:-}" in
  --dry-run) exec "$PYTHON" scripts/gpu_plan.py --budget "$LIMIT" --gpu "${LCCOST_GPU:-h200-sxm}" ;;
  kernels) mode=kernels; shift ;;
esac
OUT=${1:-out/gpu}

say() { printf '\n== %s (%s s of %s)\n' "$1" "$SECONDS" "$LIMIT"; }
left() { echo $((LIMIT - SECONDS)); }

# On stdout: the profile of the device's datasheet, if there is one.
base=$("$PYTHON" - <<'PY'
import importlib.util
import os
import sys

needed = ("numpy", "click", "rich", "torch")
missing = [n for n in needed if importlib.util.find_spec(n) is None]
if missing:
    sys.exit(f"missing Python packages: {', '.join(missing)}; put wheels of them on PYTHONPATH")
optional = {"tomli_w": "calibrate", "pytest": "the gpu tests", "pynvml": "clocks and energy",
            "triton": "the kernels"}
for name, use in optional.items():
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed: without {use}", file=sys.stderr)
import torch

if not torch.cuda.is_available():
    sys.exit(f"no CUDA device: PyTorch {torch.__version__} finds none")
title = torch.cuda.get_device_name(0)
print(f"{title}, torch {torch.__version__}, CUDA {torch.version.cuda}", file=sys.stderr)

from costmodel.errors import LccostError
from costmodel.hardware import load_hardware

try:
    print(load_hardware(os.environ.get("LCCOST_GPU") or title).name)
except LccostError:
    print(f"{title} has no profile: name the nearest as LCCOST_GPU to calibrate", file=sys.stderr)
PY
) || exit 4

mkdir -p "$OUT/done" || exit 1
failed=0
# Until there is a calibration this decides which points are worth starting; records name it.
profile=${base:-h100-sxm}
[ -e "$OUT/profile.toml" ] && profile="$OUT/profile.toml"

# Each step ends within what is left. A step returns 124 where its time ran out.
run_doctor() {
  timeout 60 "$PYTHON" -m lccost doctor --device cuda:0 --format json --output "$OUT/doctor.json"
}

run_calibrate() {
  timeout 75 "$PYTHON" -m lccost calibrate --device cuda:0 --quick ${base:+--gpu "$base"} \
    --output "$OUT/profile.toml" && profile="$OUT/profile.toml" && return 0
  echo "not calibrated: points are predicted from the datasheet of $profile" >&2
  return 1
}

run_tests() {
  "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null || return 0
  timeout -k 5 "$(left)" "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider -m gpu tests \
    2>&1 | tee "$OUT/tests.txt"
}

run_kernels() {
  timeout -k 5 "$(left)" "$PYTHON" benchmarks/kernels_gpu.py --output "$OUT/kernels.jsonl" \
    --seconds "$1"
}

run_prompt_kernels() {
  timeout -k 5 "$(left)" "$PYTHON" benchmarks/prompt_kernels_gpu.py \
    --output "$OUT/prompt_kernels.jsonl"
}

# A prompt predicted to take over a second is not run: decode is measured on random caches.
run_measure() {
  # shellcheck disable=SC2086  # options, one word each
  timeout -k 5 "$(left)" "$PYTHON" -m lccost measure --device cuda:0 --gpu "$profile" $2 \
    --output-tokens 16 --output "$OUT/$1.jsonl" --resume --isolation model --retries 0 \
    --seconds 0.3 --max-prefill 1 --timeout 90
}

# step NUMBER KIND NAME OPTIONS
step() {
  if [ -e "$OUT/done/$1-$3" ]; then return; fi
  if [ "$(left)" -lt 20 ]; then
    more=1
    return
  fi
  say "$3: ${4:-$2}"
  local began=$SECONDS code
  case "$2" in
    doctor) run_doctor ;;
    calibrate) run_calibrate ;;
    tests) run_tests ;;
    kernels) run_kernels "$(($(left) < 120 ? $(left) - 10 : 110))" ;;
    prompt-kernels) run_prompt_kernels ;;
    measure) run_measure "$3" "$4" ;;
  esac
  code=$?
  printf '   %s s\n' "$((SECONDS - began))"
  if [ "$code" = 0 ]; then touch "$OUT/done/$1-$3"; fi
  ended "$code"
}

# ended CODE: whether something failed or only ran out of time
ended() {
  case "$1" in
    0) ;;
    124 | 137) more=1 ;;
    *) failed=1 ;;
  esac
}

more=0
if [ "$mode" = kernels ]; then
  say "kernels"
  run_kernels "$(($(left) - 100))"
  ended $?
  if [ "$(left)" -gt 30 ]; then
    say "prompt kernels"
    run_prompt_kernels
    ended $?
  fi
  [ "$more" = 1 ] && echo "out of time with more to do; run again with $OUT to go on"
  exit "$failed"
fi

number=0
while IFS=$'\t' read -r -u 3 kind name options; do
  number=$((number + 1))
  step "$number" "$kind" "$name" "$options"
done 3< <("$PYTHON" scripts/gpu_plan.py --steps)

say "done"
[ "$more" = 1 ] && echo "out of time with more to do; run again with $OUT to go on"
wc -l "$OUT"/*.jsonl 2>/dev/null
exit $failed
