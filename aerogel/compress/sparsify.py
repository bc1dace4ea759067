"""Single weights pruned: the stages of `aerogel prune --sparsity` in place of cutting channels.

check -> baseline (with L1 or L2) -> (scan) -> plan -> prune and retrain, round by round -> ship -> report. Every round
begins from a file, the pruned network, whose zeros are the masks; so does a resumed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.compress.baseline import regularised
from aerogel.compress.check import Checked
from aerogel.compress.cutting import points, training_batches
from aerogel.compress.goal import WEIGHTS
from aerogel.compress.job import Job
from aerogel.compress.measure import BRIEF, compare_files, correct_on, percent, sizes
from aerogel.compress.plan import time_an_epoch
from aerogel.compress.recover import frontier
from aerogel.compress.run import ORIGINAL, Run
from aerogel.compress.sparse_settings import Sparsity
from aerogel.console import duration
from aerogel.data import batch_count
from aerogel.distill import SoftTargets
from aerogel.errors import AerogelError
from aerogel.export import open_model
from aerogel.prune import SCHEDULES, recalibrate
from aerogel.prune.dropout import dropout_rates, set_dropout
from aerogel.prune.masks import Masks
from aerogel.prune.neurons import bury, without_dead
from aerogel.prune.weights import lowest, n_of_m, per_layer, score
from aerogel.train import HardLabels, Objective, Recipe, State, accuracy, save_checkpoint, start


def check_weights(job: Job) -> Checked:
    """Raises AerogelError where a layer does not exist, or the method does not suit the network. Writes nothing."""
    settings, sparse = job.settings, _sparse(job)
    model = job.opened.model
    masks = Masks.of(model, protect=settings.protect)
    text = f"{masks.weights:,} weights in {len(masks)} layers can be pruned"
    if job.opened.trained and masks.survivors < masks.weights:
        text += f"; {100 * masks.sparsity:.2f} % of them are zero already, stay so and count"
    job.console.say("check", text)
    if job.opened.trained and (settings.schedule == "rewind" or sparse.method == "snip"):
        raise AerogelError(
            f"{'--schedule rewind' if settings.schedule == 'rewind' else '--method snip'} needs the network's first "
            "weights, not trained ones: leave --weights out, and name a network instead of a saved folder"
        )
    if sparse.rewind >= settings.train.epochs:
        raise AerogelError(
            f"option sparse.rewind must be below the {settings.train.epochs:g} epochs of training, got {sparse.rewind}"
        )
    whole = {name: torch.ones_like(mask, dtype=torch.float32) for name, mask in masks.items()}
    lowest(whole, sparse.sparsity, ratios=sparse.ratios)  # refuses what does not fit
    if sparse.n_of_m:
        unfit = unpatterned(model, whole, sparse.n_of_m[1])
        if len(unfit) == len(whole):
            raise AerogelError(f"pattern {sparse.pattern}: no layer has inputs in multiples of {sparse.n_of_m[1]}")
        if unfit:
            why = f"the second dimension is no input, or no multiple of {sparse.n_of_m[1]}"
            job.console.say("", f"stays whole: {', '.join(unfit)}: {why}")
    if settings.schedule == "gradual" and sparse.sparsity:
        points(job)
    return Checked({}, {}, text)


def plan_weights(job: Job, run: Run) -> dict[str, Any]:
    """run["plan"]: {"target": {metric: share}, "epochs": [per round], "seconds", "text"}."""
    if "plan" in run:
        return run["plan"]
    settings, sparse = job.settings, _sparse(job)
    epochs = settings.recoveries
    seconds = sum(epochs) * time_an_epoch(job, job.load(run.path / ORIGINAL)) * (4 / 3 if settings.soft_weight else 1)
    what = f"{settings.steps} prunings" if settings.steps > 1 else "one pruning"
    text = f"{what} by {sparse.method}, {settings.schedule}, to {sparse.text}, about {duration(seconds)}"
    job.console.say("plan", text)
    found = {"target": {WEIGHTS: 1 - sparse.sparsity}, "epochs": epochs, "seconds": seconds, "text": text}
    run["plan"] = found
    return found


def prune_weights(job: Job, run: Run, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Every round's candidate, the original first."""
    rounds, settings = len(plan["epochs"]), job.settings
    if f"candidate {rounds:03d}" in run:
        return frontier(job, run, rounds)
    objective = objective_of(job, run)
    for k in range(1, rounds + 1):
        name = f"{k:03d}"
        if f"candidate {name}" in run:
            continue
        job.signals.check()
        if settings.schedule == "gradual":
            model = _gradually(job, run, objective)
        else:
            model = _retrained(job, run, _pruned(job, run, k), objective, plan["epochs"][k - 1], name)
        last = settings.steps if settings.schedule == "gradual" else k
        run[f"candidate {name}"] = _candidate(job, run, model, name, last)
        for part in (f"prune {last:03d}", f"step {name}", f"leg {last:03d}"):
            run.clear("checkpoints", part)
    return frontier(job, run, rounds)


def objective_of(job: Job, run: Run) -> Objective:
    """Recovery by distillation from the original, with L1 where it is asked for; labels alone without soft_weight."""
    settings = job.settings
    found: Objective = HardLabels()
    if settings.soft_weight and _sparse(job).method != "snip":
        teacher = job.load(run.path / ORIGINAL)
        found = SoftTargets(teacher, settings.temperature, settings.hard_weight, settings.soft_weight)
    return regularised(job, found)


def masks_of(job: Job, run: Run, model: nn.Module, k: int, earlier: nn.Module | None = None) -> Masks:
    """Prunes `model` in place, for time `k` of the schedule; dead neurons are buried, unless they are kept."""
    settings, sparse = job.settings, _sparse(job)
    kept = SCHEDULES["iterative" if settings.schedule == "rewind" else settings.schedule]
    torch.manual_seed(settings.seed)  # for the random score
    before = Masks.of(model, protect=settings.protect)
    found = score(sparse.method, model, protect=settings.protect, batches=training_batches(job),
                  earlier=None if earlier is None else dict(earlier.named_parameters()))  # fmt: skip
    if sparse.n_of_m:
        masks = in_pattern(model, found, before, *sparse.n_of_m)
    else:
        ratios = {layer: 1 - kept(k, settings.steps, 1 - share) for layer, share in _shares(sparse, run).items()}
        share = kept(k, settings.steps, 1 - sparse.sparsity)
        masks = lowest(found, 1 - share, ranking=sparse.ranking, ratios=ratios, before=before)
    masks.hold(model)
    if not sparse.keep_dead:
        bury(model, job.example, protect=settings.protect)
    return Masks.of(model, protect=settings.protect)


def _shares(sparse: Sparsity, run: Run) -> dict[str, float]:
    """What single layers lose: as set, or as the scan lets them."""
    if not sparse.scan_drop:
        return sparse.ratios
    scan = run["scan"]
    curves = {name: curve["retrained"] or curve["values"] for name, curve in scan["groups"].items()}
    return per_layer(scan["shares"], curves, scan["whole"], sparse.scan_drop)


def in_pattern(model: nn.Module, scores: Mapping[str, Tensor], before: Masks, n: int, m: int) -> Masks:
    """n of m, where the inputs are a multiple of m; what is gone takes no place of what is left."""
    unfit = unpatterned(model, scores, m)
    left = {name: s.masked_fill(~before[name], -torch.inf) for name, s in scores.items() if name not in unfit}
    return before & Masks({name: n_of_m(s, n, m) for name, s in left.items()})


def unpatterned(model: nn.Module, weights: Mapping[str, Tensor], m: int) -> list[str]:
    """Those whose dimension 1 is no multiple of m, or no layer's inputs: transposed convolutions', embeddings'."""
    kinds = (nn.modules.conv._ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)
    others = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    own = dict(model.named_parameters())
    return [name for name, weight in weights.items() if weight.shape[1] % m or id(own[name]) in others]


def _pruned(job: Job, run: Run, k: int) -> nn.Module:
    """The network to retrain, read back from its file; run["prune k"] is what was done."""
    key = f"prune {k:03d}"
    folder = run.path / "checkpoints" / key
    if key not in run:
        first = _first(job) if _sparse(job).method == "snip" else job.load(run.path / ORIGINAL)
        model = first if k == 1 else job.load(run.path / f"candidates/{k - 1:03d}")
        masks = masks_of(job, run, model, k)
        told = _told(job, key, model, masks)
        if job.settings.schedule == "rewind":
            model = _rewound(job, run)
            masks.hold(model)
            _none_zero(model, masks)
        job.save(model, run.clear("checkpoints", key), onnx=False)
        run[key] = told
    return job.load(folder)


@torch.no_grad()
def _none_zero(model: nn.Module, masks: Masks) -> None:
    """A survivor that begins at zero, as some last layers do, would read as pruned: it gets the smallest number."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weights[name].masked_fill_(mask & (weights[name] == 0), torch.finfo(weights[name].dtype).tiny)


def _first(job: Job) -> nn.Module:
    """The network with the weights that the run began with."""
    settings = job.settings
    torch.manual_seed(settings.seed)
    return open_model(settings.model, input_shape=job.data.input_shape, num_classes=job.data.num_classes,
                      trust=settings.trust).model  # fmt: skip


def _rewound(job: Job, run: Run) -> nn.Module:
    """The network as it was after `rewind` epochs of its first training; the loop makes the same steps again."""
    state = start(_first(job), regularised(job, HardLabels()), job.data, job.settings.train)
    step = _rewind_step(job)
    if step:
        job.continued(state, run, "rewind")
        job.fit(state, run, "rewind", "rewind", until=step)
    return state.result


def _rewind_step(job: Job) -> int:
    recipe = job.settings.train
    return round(_sparse(job).rewind * batch_count(len(job.data.train), recipe.batch_size))


def _retrained(job: Job, run: Run, model: nn.Module, objective: Objective, epochs: float, name: str) -> nn.Module:
    """Trained again with its masks; without epochs for it, only its batch norms are measured again."""
    if not epochs:
        return recalibrate(model, training_batches(job))
    state = _held(job, model, objective, _recipe(job, epochs))
    if job.settings.schedule == "rewind":
        state.step = _rewind_step(job)
    begun = state.step
    job.continued(state, run, f"step {name}")
    if state.step > begun:
        job.console.say(f"step {name}", f"goes on at step {state.step:,} of {state.total:,}")
    return _with_its_dropout(job, job.fit(state, run, f"step {name}", f"step {name}"))


def _gradually(job: Job, run: Run, objective: Objective) -> nn.Module:
    """All prunings within one training; between two of them, a leg, the masks stay."""
    cuts = points(job)
    original = job.load(run.path / ORIGINAL)
    done = max((k for k in range(1, len(cuts) + 1) if f"prune {k:03d}" in run), default=0)
    state = _held(job, job.load(run.path / ORIGINAL), objective, _recipe(job, job.settings.recoveries[-1]))
    for k in range(done, len(cuts) + 1):
        leg = f"leg {k:03d}"
        if k == done and job.continued(state, run, leg):
            job.console.say("recover", f"goes on at step {state.step:,} of {state.total:,}")
            Masks.of(state.model, protect=job.settings.protect).put_on(state)
        model = job.fit(state, run, "gradual", leg, until=cuts[k] if k < len(cuts) else None)
        if k < len(cuts):
            masks = masks_of(job, run, state.model, k + 1, original)
            masks.put_on(state)
            save_checkpoint(run.clear("checkpoints", f"leg {k + 1:03d}"), state)
            run[f"prune {k + 1:03d}"] = _told(job, f"prune {k + 1:03d}", state.model, masks)
            run.clear("checkpoints", leg)
    return _with_its_dropout(job, model)


def _held(job: Job, model: nn.Module, objective: Objective, recipe: Recipe) -> State:
    """A training of what is pruned already, with the dropout and masks that belong to it."""
    masks = Masks.of(model, protect=job.settings.protect)
    rates = dropout_rates(model, masks)
    set_dropout(model, {name: now for name, (_, now) in rates.items()})
    if changed := [f"{name} {before:g} -> {now:.3f}" for name, (before, now) in rates.items() if now != before]:
        job.console.say("", f"dropout while retraining: {', '.join(changed)}")
    state = start(model, objective, job.data, recipe)
    masks.put_on(state)
    return state


def _with_its_dropout(job: Job, model: nn.Module) -> nn.Module:
    """As the network's own code builds it."""
    whole = job.opened.model
    set_dropout(model, {name: rate for name, (rate, _) in dropout_rates(whole, Masks.of(whole)).items()})
    return model


def _recipe(job: Job, epochs: float) -> Recipe:
    """Han's rule: a tenth of the rate after a pruning, as the weights are good already."""
    settings, sparse = job.settings, _sparse(job)
    whole = settings.schedule in ("gradual", "rewind") or sparse.method == "snip"
    rate = sparse.rate or (1.0 if whole else 0.1)
    return settings.train.model_copy(update={"epochs": epochs, "lr": rate * settings.train.lr})


def _told(job: Job, key: str, model: nn.Module, masks: Masks) -> dict[str, Any]:
    """Says what a pruning did, before any retraining; the same for the run's record."""
    right = accuracy(model, job.data, "val")
    counts = {name: list(pair) for name, pair in masks.counts().items()}
    kept = (
        f"{masks.survivors:,} of {masks.weights:,} weights left (x{masks.weights / max(1, masks.survivors):.1f} fewer)"
    )
    job.console.say(key, f"{kept}   validation {right:.2f} % before retraining")
    return {"kept": counts, "unrecovered_accuracy": right}


def _candidate(job: Job, run: Run, model: nn.Module, name: str, k: int) -> dict[str, Any]:
    settings, dead = job.settings, 0
    if k == settings.steps and not _sparse(job).keep_dead:
        _, dead = bury(model, job.example, protect=settings.protect)
    masks = Masks.of(model, protect=settings.protect)
    model = without_dead(model, job.example, protect=settings.protect).model if dead else model
    file = job.save(model, run.clear("candidates", name)) / "model.onnx"
    ratio = compare_files(job, run.path / ORIGINAL / "model.onnx", file, BRIEF).ratio
    found = {
        "name": name,
        "target": 1 - masks.sparsity,
        "val_accuracy": percent(correct_on(job, file, "val")),
        "latency_ratio": ratio.value,
        "file_bytes": file.stat().st_size,
        "kept": {layer: list(pair) for layer, pair in masks.counts().items()},
        "dead": dead,
        **sizes(job, model),
        "unrecovered_accuracy": run[f"prune {k:03d}"]["unrecovered_accuracy"],
    }
    before = run["baseline"]
    parts = (
        f"validation {found['val_accuracy']:.2f} % ({found['val_accuracy'] - before['val_accuracy']:+.2f})",
        f"weights x{masks.survivors / masks.weights:.3f}",
        f"{dead} dead neurons taken out" if dead else "",
        f"latency x{ratio.value:.3f}",
    )
    job.console.say(f"step {name}", "   ".join(filter(None, parts)))
    return found


def _sparse(job: Job) -> Sparsity:
    if job.settings.sparse is None:
        raise AerogelError("--sparsity is missing; say what share of the weights is to go, as --sparsity 0.9")
    return job.settings.sparse
