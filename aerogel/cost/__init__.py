"""What a network costs: parameters, MACs, FLOPs, access bytes, peak bytes; latency of the exported file."""

from aerogel.cost.count import Cost as Cost
from aerogel.cost.count import Layer as Layer
from aerogel.cost.count import count as count
