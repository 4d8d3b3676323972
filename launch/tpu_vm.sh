#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs: one run on all chips of all its hosts.
#
#   NFS=10.0.0.2:/share launch/tpu_vm.sh create    # the slice (a Spot one)
#   NFS=... SOURCE=https://.../lakd.git launch/tpu_vm.sh install
#   NFS=... launch/tpu_vm.sh train --config=configs/cifar100_lakd.py --config.batch_size=2048
#   NFS=... launch/tpu_vm.sh follow                # the log of host 0
#   NFS=... launch/tpu_vm.sh delete
#
# After a preemption: delete, create, install, train; the run goes on from its last
# checkpoint. NFS is a share that all hosts can mount, such as Filestore's: runs,
# teachers and data are kept there. NAME, ZONE, TYPE, VERSION can be set from outside.
set -euo pipefail

NAME=${NAME:-lakd}
ZONE=${ZONE:-europe-west4-b}
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
NFS=${NFS:?set it to the share of a file server, ADDRESS:/SHARE}
SHARED=/mnt/lakd
RUN=$SHARED/runs/${RUN:-$NAME}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

quoted() { # the arguments, as one line of a shell
  [ $# -eq 0 ] || printf '%q ' "$@"
}

case ${1:-} in
  create)
    # Without --spot it costs more and is not taken away.
    gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --version="$VERSION" --spot
    ;;
  install)
    : "${SOURCE:?set it to the address of the repository}"
    # The images have Python 3.10, which is too old: uv brings another one.
    everywhere "set -e
      sudo apt-get -q update && sudo apt-get -qy install nfs-common git
      sudo mkdir -p $SHARED
      mountpoint -q $SHARED || sudo mount -t nfs $NFS $SHARED
      [ -d lakd ] || git clone $(quoted "$SOURCE") lakd
      command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh
      cd lakd
      ~/.local/bin/uv venv --python 3.12 .venv
      ~/.local/bin/uv pip install -r requirements.txt 'jax[tpu]'"
    ;;
  train)
    shift
    # In the background and with a log, so that a lost connection does not matter. A
    # program that was killed hard may have left its lock on the chips.
    everywhere "set -e
      cd lakd
      pgrep -f '[m]ain.py' > /dev/null || rm -f /tmp/libtpu_lockfile
      nohup .venv/bin/python main.py --workdir=$RUN --coordinator=auto --wait=600 \
        --config.teacher.cache=$SHARED/teachers --config.data.data_dir=$SHARED/data \
        $(quoted "$@")> ~/lakd.log 2>&1 < /dev/null & sleep 5; tail -n 3 ~/lakd.log"
    ;;
  stop) # saves the last step
    everywhere "pkill -TERM -f '[m]ain.py --workdir=$RUN'"
    ;;
  follow)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
      --command="tail -n 50 -f ~/lakd.log"
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
    ;;
  *)
    echo "launch/tpu_vm.sh create | install | train FLAGS | stop | follow | delete" >&2
    exit 2
    ;;
esac
