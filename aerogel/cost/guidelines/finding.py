"""What lint says of an op: the rule, what is at stake on the device, and what to do instead with its predicted gain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

NOISE = 0.01  # of the network's predicted time: what is below is not worth a change
SEVERITIES = ((0.10, "high"), (0.03, "medium"), (NOISE, "low"))

RULES = {
    "G1": "unequal channels move more memory than their MACs need",
    "G2": "groups move more memory than the same MACs without groups",
    "G3": "fragments: branches and tiny kernels that one op could replace",
    "G4": "element-wise work: few FLOPs, much memory",
    "P1-simd": "channels that are no multiple of the device's vectors",
    "P2-norm": "norms that fold into no layer",
    "P3-ends": "a first layer or a classifier that dominates",
    "P4-peak": "the layer that sets the peak memory",
    "P5-onnx": "ops that ONNX Runtime lacks or runs in several passes",
}


class Amount(NamedTuple):
    """Bytes of access (of peak memory in P4) and predicted milliseconds on the device."""

    bytes: float
    ms: float


class Rewrite(NamedTuple):
    """What to write instead, and what the network is predicted to lose by it."""

    words: str
    gain: Amount
    needs_retraining: bool


@dataclass(frozen=True)
class Finding:
    """nodes and modules: the ops it speaks of, the dearest first; op, module and source are the first's.

    bytes and ms are at stake: what the op costs beyond the form that follows the rule, whatever its widths.
    gain_bytes and gain_ms are the rewrite's, with widths that the device likes; below 0 where it costs more.
    """

    rule: str
    op: str
    module: str
    source: str
    bytes: int
    ms: float
    share: float  # of the network's predicted time
    score: float | None  # the rule's own measure: access over its bound in G1 and G2, share of access in G4
    what: str
    rewrite: str
    gain_bytes: int
    gain_ms: float
    needs_retraining: bool
    note: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def severity(self) -> str:
        return severity(self.share)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity}


def severity(share: float) -> str:
    """high from 10 % of the network's predicted time, medium from 3 %, low from 1 %, noise below."""
    return next((word for least, word in SEVERITIES if share >= least), "noise")
