"""Training: a loop the caller owns, objectives that name their losses, checkpoints that are whole or absent."""

from aerogel.train.checkpoint import best_checkpoint as best_checkpoint
from aerogel.train.checkpoint import check_room as check_room
from aerogel.train.checkpoint import load_checkpoint as load_checkpoint
from aerogel.train.checkpoint import save_checkpoint as save_checkpoint
from aerogel.train.distributed import join as join
from aerogel.train.evaluate import accuracy as accuracy
from aerogel.train.evaluate import predict as predict
from aerogel.train.fit import fit as fit
from aerogel.train.interrupt import Signals as Signals
from aerogel.train.objective import HardLabels as HardLabels
from aerogel.train.objective import Objective as Objective
from aerogel.train.recipe import Recipe as Recipe
from aerogel.train.recipe import learning_rate as learning_rate
from aerogel.train.speed import Speed as Speed
from aerogel.train.steps import NotFinite as NotFinite
from aerogel.train.steps import State as State
from aerogel.train.steps import Step as Step
from aerogel.train.steps import start as start
from aerogel.train.steps import steps as steps
