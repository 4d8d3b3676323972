#!/usr/bin/env bash
# Trains one seed per chip of a host, all at the same time, then prints their table.
#
#   launch/seeds.sh 4 --config=configs/cifar10_lakd.py --config.teacher.init=runs/teacher
#
# The teacher must be finished, since each process would train it otherwise. The same
# command resumes. Works with TPUs and NVIDIA GPUs.
set -euo pipefail

COUNT=${1:?the number of chips}
shift
WORKDIR=${WORKDIR:-runs/seeds}
PYTHON=${PYTHON:-.venv/bin/python}

processes=() seeds=""
trap 'kill -TERM "${processes[@]}"' TERM INT HUP
mkdir -p "$WORKDIR"
for ((chip = 0; chip < COUNT; chip++)); do
  port=$((8476 + chip))
  # The first five are for TPUs: a single chip, and no others to talk to.
  env TPU_VISIBLE_CHIPS=$chip TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1 \
    TPU_PROCESS_BOUNDS=1,1,1 TPU_MESH_CONTROLLER_ADDRESS=localhost:$port \
    TPU_MESH_CONTROLLER_PORT=$port CUDA_VISIBLE_DEVICES=$chip \
    "$PYTHON" main.py --workdir="$WORKDIR/seed$chip" --config.seed=$chip \
    --coordinator=none "$@" > "$WORKDIR/process$chip.log" 2>&1 &
  processes+=($!)
  seeds+="${seeds:+,}$chip"
done
failed=0
for process in "${processes[@]}"; do
  wait "$process" || failed=1
done
wait # a signal ends the loop, and the processes save
if [ $failed -ne 0 ]; then
  echo "A seed has failed or was stopped; see $WORKDIR/process*.log." >&2
  exit 1
fi
exec "$PYTHON" main.py --workdir="$WORKDIR" --config.seeds="$seeds" \
  --coordinator=none "$@"
