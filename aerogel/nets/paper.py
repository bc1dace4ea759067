"""What the papers print about their nets, and where that is not what the nets count.

PAPER: net, as `nets.parse` reads it -> millions of parameters (params_M) and of multiply-adds (madds_M), top-1
accuracy on ImageNet in per cent (top1; top1_int8 when quantised), source. Numbers keep the digits of the print:
2.0 says one decimal, 56 none.
KNOWN: the nets of PAPER whose count, rounded to those digits, is another number, and why.

Not here, though the papers have numbers: MnasNet-A3 (76.7 %), whose layers are not given; ShuffleNet 0.5x
"shallow" (40M, 57.2 %), of which it is not said which units went and how wide the others became.
"""

from __future__ import annotations

from typing import TypedDict


class Printed(TypedDict, total=False):
    """One row of a paper's table; what it does not print is left out."""

    params_M: float
    madds_M: float
    top1: float
    top1_int8: float
    source: str


PAPER: dict[str, Printed] = {
    "mobilenet_v1": {"params_M": 4.2, "madds_M": 569, "top1": 70.6, "source": "arXiv:1704.04861 Table 6"},
    "mobilenet_v1:width=0.75": {"params_M": 2.6, "madds_M": 325, "top1": 68.4, "source": "arXiv:1704.04861 Table 6"},
    "mobilenet_v1:width=0.5": {"params_M": 1.3, "madds_M": 149, "top1": 63.7, "source": "arXiv:1704.04861 Table 6"},
    "mobilenet_v1:width=0.25": {"params_M": 0.5, "madds_M": 41, "top1": 50.6, "source": "arXiv:1704.04861 Table 6"},
    "mobilenet_v1:input_size=192": {
        "params_M": 4.2,
        "madds_M": 418,
        "top1": 69.1,
        "source": "arXiv:1704.04861 Table 7",
    },
    "mobilenet_v1:input_size=160": {
        "params_M": 4.2,
        "madds_M": 290,
        "top1": 67.2,
        "source": "arXiv:1704.04861 Table 7",
    },
    "mobilenet_v1:input_size=128": {
        "params_M": 4.2,
        "madds_M": 186,
        "top1": 64.4,
        "source": "arXiv:1704.04861 Table 7",
    },
    "mobilenet_v1:width=0.5,input_size=160": {
        "params_M": 1.32,
        "madds_M": 76,
        "top1": 60.2,
        "source": "arXiv:1704.04861 Table 9",
    },
    "mobilenet_v1:depthwise=false": {
        "params_M": 29.3,
        "madds_M": 4866,
        "top1": 71.7,
        "source": "arXiv:1704.04861 Table 4",
    },
    "mobilenet_v2": {"params_M": 3.4, "madds_M": 300, "top1": 72.0, "source": "arXiv:1801.04381 Table 4"},
    "mobilenet_v2:width=1.4": {"params_M": 6.9, "madds_M": 585, "top1": 74.7, "source": "arXiv:1801.04381 Table 4"},
    "mobilenet_v3_large": {
        "params_M": 5.4,
        "madds_M": 219,
        "top1": 75.2,
        "top1_int8": 73.8,
        "source": "arXiv:1905.02244 Tables 3, 4",
    },
    "mobilenet_v3_large:width=0.75": {
        "params_M": 4.0,
        "madds_M": 155,
        "top1": 73.3,
        "source": "arXiv:1905.02244 Table 3",
    },
    "mobilenet_v3_small": {
        "params_M": 2.5,
        "madds_M": 56,
        "top1": 67.4,
        "top1_int8": 64.9,
        "source": "arXiv:1905.02244 Tables 3, 4",
    },
    "mobilenet_v3_small:width=0.75": {
        "params_M": 2.0,
        "madds_M": 44,
        "top1": 65.4,
        "source": "arXiv:1905.02244 Table 3",
    },
    "mobilenet_v3_small:last_channels=1280": {
        "params_M": 2.9,
        "madds_M": 66,
        "top1": 67.4,
        "source": "arXiv:1905.02244 Table 3, earlier text",
    },
    "mobilenet_v3_small:width=0.75,last_channels=1280": {
        "params_M": 2.4,
        "madds_M": 44,
        "top1": 65.4,
        "source": "arXiv:1905.02244 Table 3, earlier text",
    },
    "mnasnet_a1": {"params_M": 3.9, "madds_M": 312, "top1": 75.2, "source": "arXiv:1807.11626 section 6.1"},
    "mnasnet_a1:width=0.35": {"params_M": 1.7, "madds_M": 63, "top1": 64.1, "source": "arXiv:1807.11626 Table 4"},
    "mnasnet_small": {"params_M": 2.0, "madds_M": 68, "top1": 66.0, "source": "arXiv:1807.11626 Table 4"},
    "shufflenet_v1:groups=1": {"madds_M": 143, "top1": 66.4, "source": "arXiv:1707.01083 Tables 1, 2"},
    "shufflenet_v1:groups=2": {"madds_M": 140, "top1": 67.3, "source": "arXiv:1707.01083 Tables 1, 2"},
    "shufflenet_v1:groups=3": {"madds_M": 137, "top1": 67.4, "source": "arXiv:1707.01083 Tables 1, 2"},
    "shufflenet_v1:groups=4": {"madds_M": 133, "top1": 67.2, "source": "arXiv:1707.01083 Tables 1, 2"},
    "shufflenet_v1:groups=8": {"madds_M": 137, "top1": 67.6, "source": "arXiv:1707.01083 Tables 1, 2"},
    "shufflenet_v1:groups=1,width=0.5": {"madds_M": 38, "top1": 54.9, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=2,width=0.5": {"madds_M": 38, "top1": 55.6, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=3,width=0.5": {"madds_M": 38, "top1": 56.8, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=4,width=0.5": {"madds_M": 38, "top1": 58.4, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=8,width=0.5": {"madds_M": 38, "top1": 57.7, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=1,width=0.25": {"madds_M": 13, "top1": 42.9, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=2,width=0.25": {"madds_M": 13, "top1": 43.2, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=3,width=0.25": {"madds_M": 13, "top1": 45.0, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=4,width=0.25": {"madds_M": 13, "top1": 45.8, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=8,width=0.25": {"madds_M": 13, "top1": 47.3, "source": "arXiv:1707.01083 Table 2"},
    "shufflenet_v1:groups=3,width=1.5": {"madds_M": 292, "top1": 71.5, "source": "arXiv:1707.01083 Table 5"},
    "shufflenet_v1:groups=3,width=2.0": {"madds_M": 524, "top1": 73.7, "source": "arXiv:1707.01083 Table 5"},
    "shufflenet_v1:groups=3,width=2.0,se=true": {"madds_M": 527, "top1": 75.3, "source": "arXiv:1707.01083 Table 5"},
    "shufflenet_v2:width=0.5": {"params_M": 1.4, "madds_M": 41, "top1": 60.3, "source": "arXiv:1807.11164 Tables 5, 8"},
    "shufflenet_v2:width=1.0": {
        "params_M": 2.3,
        "madds_M": 146,
        "top1": 69.4,
        "source": "arXiv:1807.11164 Tables 5, 8",
    },
    "shufflenet_v2:width=1.5": {
        "params_M": 3.5,
        "madds_M": 299,
        "top1": 72.6,
        "source": "arXiv:1807.11164 Tables 5, 8",
    },
    "shufflenet_v2:width=2.0": {
        "params_M": 7.4,
        "madds_M": 591,
        "top1": 74.9,
        "source": "arXiv:1807.11164 Tables 5, 8",
    },
    "shufflenet_v2:width=2.0,se=true": {"madds_M": 597, "top1": 75.4, "source": "arXiv:1807.11164 Table 8"},
}

CUT = "digits cut off where we round: "
CONVOLUTIONS = "the convolutions alone: "
NOMINAL = "the complexity aimed at by the whole row of the table; how the channels were rounded is not said"
ABOVE = "the paper is 1 % above what its Table 5 makes"

KNOWN: dict[str, str] = {
    "mobilenet_v1:input_size=160": f"{CONVOLUTIONS}289.7M; with the classifier 290.7M",
    "mobilenet_v1:width=0.5,input_size=160": f"{CONVOLUTIONS}76.0M; without normalisations 1.32M",
    "mobilenet_v1:depthwise=false": f"{CONVOLUTIONS}4866.3M",
    "mobilenet_v2": f"{CUT}3.47M (without normalisations) and 300.8M",
    "mobilenet_v2:width=1.4": "the official code makes 6.11M and 582M, as here, and its README says 6.06M and 582M",
    "mobilenet_v3_large": f"{CUT}5.48M; the official README says 217M, as here",
    "mobilenet_v3_small": f"{CUT}56.5M",
    "mobilenet_v3_small:width=0.75": "44M is that of the earlier text's 1280 channels, though 2.0M is not",
    "mobilenet_v3_small:last_channels=1280": "the paper's Table 2 makes 56.9M; its later text says 56M",
    "mnasnet_a1:width=0.35": "the README's table is 1 to 2.5 % above what the official code makes at every width",
    "shufflenet_v1:groups=2": f"{CONVOLUTIONS}140.0M",
    "shufflenet_v1:groups=4": f"{CONVOLUTIONS}133.3M",
    "shufflenet_v1:groups=8": f"{CONVOLUTIONS}136.8M",
    "shufflenet_v1:groups=1,width=0.5": f"{CONVOLUTIONS}38.2M",
    "shufflenet_v1:groups=2,width=0.5": NOMINAL,
    "shufflenet_v1:groups=4,width=0.5": NOMINAL,
    "shufflenet_v1:groups=8,width=0.5": NOMINAL,
    "shufflenet_v1:groups=1,width=0.25": NOMINAL,
    "shufflenet_v1:groups=2,width=0.25": NOMINAL,
    "shufflenet_v1:groups=3,width=0.25": NOMINAL,
    "shufflenet_v1:groups=4,width=0.25": NOMINAL,
    "shufflenet_v1:groups=8,width=0.25": NOMINAL,
    "shufflenet_v1:groups=3,width=2.0,se=true": "how far squeeze-and-excite reduces is not said; here 526.5M",
    "shufflenet_v2:width=0.5": ABOVE,
    "shufflenet_v2:width=1.0": ABOVE,
    "shufflenet_v2:width=1.5": ABOVE,
    "shufflenet_v2:width=2.0": ABOVE,
    "shufflenet_v2:width=2.0,se=true": f"{ABOVE}; how far squeeze-and-excite reduces is not said",
}
