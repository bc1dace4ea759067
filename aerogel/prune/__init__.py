"""Structured pruning: coupled channels, cut and proven."""

from aerogel.prune.coupling import couple as couple
from aerogel.prune.criteria import CRITERIA as CRITERIA
from aerogel.prune.cut import Cut as Cut
from aerogel.prune.cut import cut as cut
from aerogel.prune.cut import deepest as deepest
