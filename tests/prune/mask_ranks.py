"""What `test_mask_ranks` runs in every process: so many steps of a pruned network, and what is left of its zeros.

python mask_ranks.py FOLDER OPTIMIZER STEPS     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_masks import DATA, OPTIMIZERS, net

from aerogel.prune.weights.along import prune
from aerogel.train import HardLabels, Recipe, join, start, steps


def main() -> None:
    folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    join()
    state = start(net(), HardLabels(), DATA, Recipe(epochs=60, batch_size=64, warmup=0, autocast="bf16", ema=0.9))
    state.optimizer = OPTIMIZERS[name](list(state.model.parameters()))
    for step in steps(state, DATA):
        if step.number == 5:
            masks = prune(state, 0.8)
        if step.number == 5 + count:
            break
    held = {f"mask {key}": mask for key, mask in masks.items()}
    for kind, module in (("model", state.model), ("average", state.result)):
        held |= {f"{kind} {key}": weight.detach().clone() for key, weight in module.named_parameters()}
    save_file(held, folder / f"{name}_{os.environ['RANK']}.safetensors")


if __name__ == "__main__":
    main()
