#!/usr/bin/env bash
# Train, judge and time the full-size presets on a machine with an NVIDIA GPU; small JSON results to commit.
#
#   benchmarks/gpu.sh DATA OUT [--wheels DIR] [--train-seconds 3000] [--call-seconds 540] [--smoke]
#
# DATA is a category in MVTec layout (MTD). A call does as much as fits into --call-seconds and stops cleanly; the same
# call again goes on, until it says that all is done. --train-seconds are for all trainings together. --wheels: a folder
# of wheels for a machine that reaches no package index and has torch already. --smoke: minutes on a CPU, to test this
# script. Models lie in OUT/models (not to be committed), results in OUT/results.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
arguments=()
while (($#)); do
  case $1 in
    --wheels)
      wheels=$2
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

if [[ -n ${wheels:-} ]]; then
  # torch and what else is there already is kept; only what is missing comes from the folder.
  "$python" -m pip install --quiet --no-index --find-links "$wheels" --no-deps "$wheels"/*.whl
  export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" "$root/benchmarks/gpu.py" "${arguments[@]}"
