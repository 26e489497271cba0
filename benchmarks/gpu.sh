#!/usr/bin/env bash
# Train, judge and time the full-size presets on a machine with an NVIDIA GPU; small JSON results to commit.
#
#   benchmarks/gpu.sh DATA OUT [--wheels DIR] [--train-seconds 1000] [--call-seconds 540] [--smoke]
#
# DATA is a category in MVTec layout (MTD). A call does as much as fits into --call-seconds and stops cleanly; the same
# call again goes on, until it says that all is done. --train-seconds are for all trainings together. --wheels: a folder
# with the wheels of exactly those packages that a machine without a package index lacks. --smoke: minutes on a CPU, to
# test this script. Models lie in OUT/work (not to be committed); OUT/results.json is the result.
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

site=
if [[ -n ${wheels:-} ]]; then
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$root/src${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/benchmarks/gpu.py" "${arguments[@]}"
