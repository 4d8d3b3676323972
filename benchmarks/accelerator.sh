#!/usr/bin/env bash
# Measures throughput on an accelerator, for RESULTS.md: both pairs at both batch sizes,
# KD and LAKD, both types, against compiled PyTorch or what else PEER names.
#
#   benchmarks/accelerator.sh        # all parts, then the table
#   benchmarks/accelerator.sh 1 2    # these parts
#
# A part is a pair at a batch size. It ends after LIMIT_S seconds, four parts within 20
# minutes. Every measurement is recorded when it is made and is not repeated, so the
# same command continues where a limit stopped it. The sizes can be set from outside:
#
#   PAIRS="resnet14,resnet8" BATCHES=4 PEER=torch-eager benchmarks/accelerator.sh \
#     --rounds=2 --steps=1 --matmul_side=64 --copy_mib=1
#
# Exit codes: 0 all is recorded; 1 something cannot be measured here; 3 a limit was
# reached.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
PAIRS=${PAIRS:-resnet32x4,resnet8x4 resnet56,resnet20}
BATCHES=${BATCHES:-64 1024}
METHODS=${METHODS:-kd,lakd}
DTYPES=${DTYPES:-float32,bfloat16}
PEER=${PEER:-torch-compile}
LIMIT_S=${LIMIT_S:-300}
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
      --method="$METHODS" --dtype="$DTYPES" --peer="$PEER" \
      --results="$RESULTS" "${flags[@]}"
    case $? in
      0) ;;
      124 | 137)
        echo "part $number reached its limit of $LIMIT_S s; the same command continues it"
        status=3
        ;;
      *) exit 1 ;;
    esac
  done
done
"$PYTHON" -m benchmarks.throughput --table --results="$RESULTS"
exit $status
