"""`lint`: the four guidelines of ShuffleNetV2 and five of practice, as advice with its price on a device.

N. Ma, X. Zhang, H.-T. Zheng, J. Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
ECCV 2018, arXiv:1807.11164, section 2. The paper measured them on a GTX 1080Ti with batch 8 and a Snapdragon 810 with
batch 1; here each is priced by the roofline of the chosen device. So a layer that breaks G1 and is bound by its MACs
there has nothing at stake, and the same layer on a device with slow memory has.
"""

from __future__ import annotations

from collections.abc import Iterable

from aerogel.cost.device import Device
from aerogel.cost.guidelines.elementwise import elementwise
from aerogel.cost.guidelines.exceptions import Exceptions
from aerogel.cost.guidelines.finding import NOISE as NOISE
from aerogel.cost.guidelines.finding import RULES as RULES
from aerogel.cost.guidelines.finding import Finding as Finding
from aerogel.cost.guidelines.finding import severity as severity
from aerogel.cost.guidelines.fragments import fragments
from aerogel.cost.guidelines.groups import costly_groups
from aerogel.cost.guidelines.layers import dominant_ends, empty_lanes, unfolded_norms
from aerogel.cost.guidelines.network import read
from aerogel.cost.guidelines.runtime import peak_layer, slow_ops
from aerogel.cost.guidelines.width import unequal_channels
from aerogel.errors import AerogelError
from aerogel.graph import Graph


def lint(graph: Graph, device: Device, allow: Iterable[str] = ()) -> list[Finding]:
    """What the rules say of a captured network on that device, most milliseconds at stake first.

    allow: "RULE:PATTERN" takes the modules that match (as in a shell: "G2:features.stage2.*") out of a rule; so does
    the comment "# aerogel: allow G2" on the line of the forward that calls the op.
    Raises AerogelError for an unknown rule, or a pattern that no module matches.
    """
    if not isinstance(device, Device):
        raise AerogelError(
            f"lint: device must be a Device, got {type(device).__name__}; write device=ag.cost.device('raspberry_pi_4')"
        )
    exceptions = Exceptions.read(graph, allow)
    net = read(graph, device, exceptions.allowed)
    claimed: set[int] = set()
    found = [
        *unequal_channels(net),
        *costly_groups(net),
        *fragments(net, claimed),
        *elementwise(net, claimed),
        *empty_lanes(net),
        *unfolded_norms(net),
        *dominant_ends(net),
        *peak_layer(net),
        *slow_ops(net),
    ]
    return sorted(found, key=lambda finding: (-finding.ms, -finding.bytes))
