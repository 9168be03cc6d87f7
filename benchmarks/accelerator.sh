#!/bin/sh
# What docs/accelerator.md says of the accelerator, modelled: its three networks, weights and activations of some widths.
# Usage: sh benchmarks/accelerator.sh [WEIGHT_BITS ACT_BITS]
set -e
bits="--weight-bits ${1:-8} --act-bits ${2:-16}"
heads="--model.head linear --model.distillation=[]"
echo "== M3ViT-S, PASCAL-Context 512x512, ZCU104"
m3vit hw cost pascal-small $heads --board zcu104 $bits
echo "== M3ViT-S, NYUD 480x640, ZCU104"
m3vit hw cost nyud-small $heads --board zcu104 $bits
echo "== Edge-MoE's network (129 tokens of 192, 16 experts of 384, top-2), ZCU102"
m3vit hw cost nyud-small $heads --board zcu102 $bits --model.trunk vit_tiny_patch16_224 --model.trunk_args.num_heads 3 \
    --model.image_size=[128,256] --model.tasks=[semseg] --model.top_k 2 --model.expert_ratio 2
