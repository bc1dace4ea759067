"""Makes checkpoints.json from the libraries' own nets; needs torchvision and timm, which the tests do not.

python tests/nets/goldens/make_checkpoints.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))
HERE = Path(__file__).parent / "checkpoints.json"
NETS = [
    ("mobilenet_v2", {}, "torchvision", "mobilenet_v2"),
    ("mobilenet_v3_large", {}, "torchvision", "mobilenet_v3_large"),
    ("mobilenet_v3_small", {}, "torchvision", "mobilenet_v3_small"),
    ("shufflenet_v2", {"width": 0.5}, "torchvision", "shufflenet_v2_x0_5"),
    ("shufflenet_v2", {"width": 1.0}, "torchvision", "shufflenet_v2_x1_0"),
    ("mnasnet_b1", {}, "torchvision", "mnasnet1_0"),
    ("mobilenet_v1", {}, "timm", "mobilenetv1_100"),
    ("mobilenet_v1", {"width": 1.25}, "timm", "mobilenetv1_125"),
    ("mobilenet_v2", {}, "timm", "mobilenetv2_100"),
    ("mobilenet_v2", {"width": 0.5}, "timm", "mobilenetv2_050"),
    ("mobilenet_v3_large", {}, "timm", "mobilenetv3_large_100"),
    ("mobilenet_v3_small", {}, "timm", "mobilenetv3_small_100"),
    ("mnasnet_b1", {}, "timm", "mnasnet_100"),
    ("mnasnet_a1", {}, "timm", "semnasnet_100"),
    ("mobilenet_v3_large", {"padding": "same"}, "timm_tf", "tf_mobilenetv3_large_100"),
    ("mobilenet_v3_small", {"padding": "same"}, "timm_tf", "tf_mobilenetv3_small_100"),
    ("mobilenet_v3_small", {"padding": "same", "width": 0.75}, "timm_tf", "tf_mobilenetv3_small_075"),
    ("mobilenet_v3_large", {"padding": "same", "minimalistic": True}, "timm_tf", "tf_mobilenetv3_large_minimal_100"),
    ("mobilenet_v3_small", {"padding": "same", "minimalistic": True}, "timm_tf", "tf_mobilenetv3_small_minimal_100"),
]


def main() -> None:
    HERE.write_text("[]")
    from test_weights import image, weight

    held = []
    for net, args, source, name in NETS:
        make = (
            timm.create_model if source.startswith("timm") else lambda n: getattr(torchvision.models, n)(weights=None)
        )
        theirs = make(name).eval()
        state = theirs.state_dict()
        keys = [[key, list(tensor.shape)] for key, tensor in state.items()]
        for key, shape in keys:
            state[key].copy_(weight(key, shape))
        with torch.no_grad():
            logits = theirs(image())[0, :16].tolist()
        if source.startswith("timm"):
            usual = theirs.pretrained_cfg
        else:
            usual = vars(torchvision.models.get_model_weights(name).DEFAULT.transforms())
        reads = {"mean": list(usual["mean"]), "std": list(usual["std"])}
        known = {"net": net, "args": args, "source": source, "theirs": name, "preprocessing": reads}
        held.append(known | {"keys": keys, "logits": logits})
    HERE.write_text("[\n" + ",\n".join(json.dumps(one) for one in held) + "\n]\n")


if __name__ == "__main__":
    main()
