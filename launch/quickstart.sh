#!/usr/bin/env bash
# From nothing to an exported, evaluated encoder: k = 3 views, DeepSpeed ZeRO-2, two processes. About 3 minutes on two cores
# after the installation. Usage: bash launch/quickstart.sh [FOLDER]      FOLDER: where everything goes, default runs/quickstart
set -euo pipefail
out="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/quickstart}")"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" base
if [ -e "$out" ]; then
    echo "quickstart: $out is there from an earlier time; remove it, or give another folder" >&2
    exit 2
fi

device=auto
if [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -lt 2 ]; then
    device=cpu
    export DS_ACCELERATOR=cpu # two processes share no GPU; said aloud, since DeepSpeed warns of what it finds out alone
fi

python -m tools.data.digits "$out/shards"
deepspeed --log_level error --num_accelerators 2 --module mvpretrain train recipes/digits.yaml run="$out/run" \
    data.train="$out/shards/train-*.tar" data.eval="$out/shards/test-*.tar" engine.ranks=2 engine.device=$device
mvpretrain export "$out/run" "$out/export"
mvpretrain evaluate "$out/export"
echo "everything is in $out"
