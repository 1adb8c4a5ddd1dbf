#!/usr/bin/env bash
# What is done where a CUDA device is at hand, in one command of at most nine minutes:
#
#   scripts/gpu_run.sh [OUTPUT]            gpu tests, calibration, a grid of records
#   scripts/gpu_run.sh kernels [OUTPUT]    benchmarks of the Triton kernels alone
#
# Everything lands in OUTPUT (default out/gpu). Run again with the same OUTPUT it goes on where it
# stopped: records and the profile that are there are kept. Nothing is installed and no setting of
# the GPU is touched. LCCOST_GPU_SECONDS (520) bounds the whole, PYTHON names the interpreter.
# Exit: 0 done, or out of time with more to do (it says so); 1 something failed; 4 no device, or a
# package is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
LIMIT=${LCCOST_GPU_SECONDS:-520}
mode=all
if [ "${1:-}" = kernels ]; then mode=kernels; shift; fi
OUT=${1:-out/gpu}

say() { printf '\n== %s (%s s of %s)\n' "$1" "$SECONDS" "$LIMIT"; }
left() { echo $((LIMIT - SECONDS)); }

"$PYTHON" - <<'PY' || exit 4
import importlib.util
import sys

needed = ("numpy", "click", "rich", "torch")
missing = [n for n in needed if importlib.util.find_spec(n) is None]
if missing:
    sys.exit(f"missing Python packages: {', '.join(missing)}; put wheels of them on PYTHONPATH")
optional = {"tomli_w": "calibrate", "pytest": "the gpu tests", "pynvml": "clocks and energy"}
for name, use in optional.items():
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed: without {use}", file=sys.stderr)
import torch

if not torch.cuda.is_available():
    sys.exit(f"no CUDA device: PyTorch {torch.__version__} finds none")
print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PY

mkdir -p "$OUT" || exit 1
failed=0

if [ "$mode" = kernels ]; then
  say "kernels"
  timeout "$(left)" "$PYTHON" benchmarks/kernels_gpu.py --output "$OUT/kernels.jsonl"
  failed=$?
  if [ "$(left)" -gt 30 ]; then
    say "prompt kernels"
    timeout "$(left)" "$PYTHON" benchmarks/prompt_kernels_gpu.py \
      --output "$OUT/prompt_kernels.jsonl" || failed=1
  fi
  exit "$failed"
fi

"$PYTHON" -m lccost doctor --device cuda:0 --format json --output "$OUT/doctor.json" || failed=1

if [ ! -e "$OUT/tests.passed" ] && "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
  say "tests that need a GPU"
  if timeout 120 "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider -m gpu tests \
      2>&1 | tee "$OUT/tests.txt"; then
    touch "$OUT/tests.passed"
  else
    failed=1
  fi
fi

profile="$OUT/profile.toml"
if [ ! -e "$profile" ]; then
  say "calibration"
  timeout 75 "$PYTHON" -m lccost calibrate --device cuda:0 --quick --output "$profile" ||
    echo "not calibrated: points are predicted from the datasheet" >&2
fi
if [ ! -e "$profile" ]; then
  profile=$("$PYTHON" - <<'PY'
import torch

from costmodel.errors import LccostError
from costmodel.hardware import load_hardware

try:
    print(load_hardware(torch.cuda.get_device_name(0)).name)
except LccostError:
    print("h100-sxm")  # only decides which points are worth starting; records name it
PY
  )
fi

# measure NAME MODELS METHODS CONTEXTS BATCHES [MORE...]: adds to OUTPUT/NAME.jsonl
measure() {
  local name=$1 model=$2 methods=$3 contexts=$4 batches=$5
  shift 5
  if [ "$(left)" -lt 20 ]; then
    echo "out of time before $name; run again to go on"
    return
  fi
  say "$name: $model, $contexts, batch $batches"
  # A prompt predicted to take over a second is not run: decode is measured on random caches.
  timeout -k 5 "$(left)" "$PYTHON" -m lccost measure --device cuda:0 --gpu "$profile" \
    --model "$model" --method "$methods" --context "$contexts" --batch "$batches" \
    --output-tokens 16 --output "$OUT/$name.jsonl" --resume --isolation model --retries 0 \
    --seconds 0.3 --max-prefill 1 --timeout 90 "$@"
  local code=$?
  if [ $code -eq 124 ]; then
    echo "out of time in $name; run again to go on"
  elif [ $code -ne 0 ]; then
    failed=1
  fi
}

ALL=$("$PYTHON" -c '
from measure.methods import runnable_names
print(",".join(["full", *(n for n in runnable_names() if n != "full"), "kivi:bits=4"]))
')
# What is compared most comes first; a run that is cut short has it.
measure energy llama-3.1-8b full,kivi,h2o 32k 1,8 --energy 5
measure llama-3.1-8b llama-3.1-8b "$ALL" 8k,128k 1 --energy 0
measure llama-3.1-8b llama-3.1-8b "$ALL" 8k,32k 8 --energy 0
measure recurrent mamba2-2.7b,recurrentgemma-9b full 8k,32k,128k 1,8,32 --energy 0
measure transformers llama-3.1-8b full,kv_offload,hf_quanto,hf_hqq 8k,32k 1 --energy 0 \
  --engine transformers
measure kernels-in-place llama-3.1-8b "$ALL" 8k,128k 1 --energy 0 --engine lccost
measure llama-3.1-8b llama-3.1-8b "$ALL" 8k,16k,32k,64k,128k 1,8,32 --energy 0

say "done"
wc -l "$OUT"/*.jsonl 2>/dev/null
exit $failed
