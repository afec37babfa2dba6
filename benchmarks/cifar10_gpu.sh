#!/usr/bin/env bash
# The comparison that a GPU makes affordable: WRN-16-4 and ResNet-164 on all of CIFAR-10, every view, in bfloat16 and compiled.
#
#     benchmarks/cifar10_gpu.sh IMAGES OUTPUT [more flags of `cmpe-se compare`, such as --seeds=5 --epochs=60 --dry-run]
#
# IMAGES has class folders (train/<class>/, test/<class>/); for torchvision's files add --data=cifar10. All GPUs are used, and the
# same command goes on where it was stopped.
set -euo pipefail
images=$1 output=$2
shift 2
views=double_fc,pair_view_2x1,pair_view_1x1,folded_3x3
for network in wrn16_4 preact_resnet164; do
  cmpe-se compare --models "$network,se_$network,cmpe_se_$network" --views "$views" --recipe cifar-fast \
    --data folder --data-dir "$images" --precision bfloat16 --compile true --output "$output/$network" "$@"
done
