"""Knowledge distillation: one loss a file."""

from aerogel.distill.soft_targets import SoftTargets as SoftTargets
from aerogel.distill.soft_targets import soft_target_loss as soft_target_loss
