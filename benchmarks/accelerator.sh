#!/usr/bin/env bash
# Throughput on an accelerator, for RESULTS.md: both pairs at both batch sizes, KD and
# LAKD, both types, against compiled PyTorch and, if PEER names one, another library; then
# several seeds in one program.
#
#   benchmarks/accelerator.sh        # all parts, then the table
#   benchmarks/accelerator.sh 1 2    # these parts
#
# A part is a pair at a batch size, the last one is the seeds. It ends after LIMIT_S
# seconds, five parts within 25 minutes; every measurement is recorded when it is made and not made again, so what a
# limit cut off is what the same command does next. The sizes can be set from outside:
#
#   PAIRS="resnet14,resnet8" BATCHES=4 TORCH=eager benchmarks/accelerator.sh \
#     --rounds=2 --steps=1 --matmul_side=64 --copy_mib=1
#
# Exit codes: 0 all is recorded; 1 something cannot be measured here; 3 a limit was met.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
PAIRS=${PAIRS:-resnet32x4,resnet8x4 resnet56,resnet20}
BATCHES=${BATCHES:-64 1024}
METHODS=${METHODS:-kd,lakd}
DTYPES=${DTYPES:-float32,bfloat16}
TORCH=${TORCH:-compile}
PEER=${PEER:-}
LIMIT_S=${LIMIT_S:-300}
SEEDS=${SEEDS:-5}
SEEDS_PAIR=${SEEDS_PAIR:-resnet56,resnet20}
RESULTS=${RESULTS:-benchmarks/results/throughput}

parts=() flags=(--rounds=10 --steps=20)
for argument in "$@"; do
  case $argument in
    --*) flags+=("$argument") ;;
    *) parts+=("$argument") ;;
  esac
done

number=0 status=0
for batch in $BATCHES; do
  for pair in $PAIRS; do
    number=$((number + 1))
    if [ ${#parts[@]} -gt 0 ] && [[ " ${parts[*]} " != *" $number "* ]]; then
      continue
    fi
    echo "== part $number: $pair, batch $batch"
    # An interrupt first: it lets Python give the device back.
    timeout --signal=INT --kill-after=20 "$LIMIT_S" \
      "$PYTHON" -m benchmarks.throughput --pair="$pair" --batch="$batch" \
      --method="$METHODS" --dtype="$DTYPES" --torch="$TORCH" --peer="$PEER" \
      --results="$RESULTS" "${flags[@]}"
    case $? in
      0) ;;
      124 | 137)
        echo "part $number met its limit of $LIMIT_S s; the same command goes on"
        status=3
        ;;
      *) exit 1 ;;
    esac
  done
done
number=$((number + 1))
if [ ${#parts[@]} -eq 0 ] || [[ " ${parts[*]} " == *" $number "* ]]; then
  echo "== part $number: $SEEDS seeds of $SEEDS_PAIR"
  timeout --signal=INT --kill-after=20 "$LIMIT_S" \
    "$PYTHON" -m benchmarks.seeds --pair="$SEEDS_PAIR" --seeds="$SEEDS" || status=3
fi
"$PYTHON" -m benchmarks.throughput --table --results="$RESULTS"
exit $status
