"""Structured pruning: coupled channels, cut and proven."""

from aerogel.prune.coupling import couple as couple
from aerogel.prune.criteria import CRITERIA as CRITERIA
from aerogel.prune.criteria import criterion as criterion
from aerogel.prune.cut import Cut as Cut
from aerogel.prune.cut import cut as cut
from aerogel.prune.cut import deepest as deepest
from aerogel.prune.evidence import Evidence as Evidence
from aerogel.prune.evidence import gather as gather
from aerogel.prune.recalibrate import recalibrate as recalibrate
from aerogel.prune.schedule import SCHEDULES as SCHEDULES
from aerogel.prune.schedule import cut_points as cut_points
from aerogel.prune.sensitivity import Sensitivity as Sensitivity
from aerogel.prune.sensitivity import sensitivity as sensitivity
