"""What a network costs: parameters, MACs, FLOPs, access bytes, peak bytes; latency of the exported file."""

from aerogel.cost.count import Cost as Cost
from aerogel.cost.count import Layer as Layer
from aerogel.cost.count import Sums as Sums
from aerogel.cost.count import Verified as Verified
from aerogel.cost.count import count as count
from aerogel.cost.device import Device as Device
from aerogel.cost.device import device as device
from aerogel.cost.guidelines import Finding as Finding
from aerogel.cost.guidelines import lint as lint
from aerogel.cost.roofline import roofline as roofline
from aerogel.cost.verify import verified as verified
from aerogel.cost.verify import verify as verify
