"""Ground truths that train again: on random subsets, on wrong labels, on one example more."""

import time
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from influence.examples import ExampleBatch
from influence.objectives import forward, training_loss
from influence.passes import run_pass
from influence.validation.estimators import fit_curvature, fit_diagonal
from influence.validation.lds import random_subsets
from tasks import store
from tasks.precision import DTYPES
from tasks.shards import ShardRef
from tasks.validation.context import BenchmarkContext
from tasks.validation.datasets import random_generator
from tasks.validation.networks import build
from tasks.validation.subject import (
    Subject,
    damping_of_seed,
    model_file,
    open_splits,
    open_subject,
    subject_of,
)
from tasks.validation.training import fit, outputs_of_many, train_many


def subset_shard(context: BenchmarkContext, shard: ShardRef, path: Path) -> None:
    """f of the queries of the first seed, after training on some of the subsets: [s, r, q].

    Runs in float32: what differs between trainings is far above its rounding.
    """
    given = context.params.retraining
    assert given is not None
    started = time.perf_counter()
    chosen = store.read_metadata(model_file(context, 0))["chosen"]
    splits = open_splits(context, context.params.seeds[0])
    subject = open_subject(context, 0)
    dtype = torch.float32
    train, queries = _single(subject.train), _single(subject.queries)
    subsets = random_subsets(
        subject.num_examples, given.subsets, given.share, context.params.seeds[0]
    )
    jobs = [(s, r) for s in shard.items for r in range(given.seeds)]
    found = []
    for start in range(0, len(jobs), given.at_once):
        some = jobs[start : start + given.at_once]
        stacked = train_many(
            lambda seed: build(context.params.network, splits, dtype, seed),
            train,
            [subsets[s] for s, _ in some],
            # Each training has weights and an order of its own.
            [1_000_000 + s * given.seeds + r for s, r in some],
            context.params.training,
            chosen["learning_rate"],
            chosen["weight_decay"],
            given.epochs,
        )
        found.append(_measured(context, splits, stacked, queries))
    f = torch.cat(found).double().unflatten(0, (len(shard.items), given.seeds))
    told = {"seconds": time.perf_counter() - started}
    store.write_tensors(path, {"f": f, "subsets": subsets[list(shard.items)]}, told)


def _single(batch):
    """The batch in float32, where it has numbers."""
    if isinstance(batch, ExampleBatch):
        targets = batch.targets.float() if batch.targets.is_floating_point() else batch.targets
        return ExampleBatch(batch.ids, batch.inputs.float(), targets, batch.likelihood)
    return batch


@torch.no_grad()
def _measured(context, splits, stacked, queries) -> Float[Tensor, "m q"]:
    """f of the queries under each of many models."""
    structure = build(context.params.network, splits, torch.float32, 0)
    num_models = len(next(iter(stacked.values())))
    inputs = queries.inputs.expand(num_models, *queries.inputs.shape)
    outputs = outputs_of_many(structure, stacked, inputs)
    return torch.stack([-training_loss(each, queries) for each in outputs])


def mislabelled_shard(context: BenchmarkContext, shard: ShardRef, path: Path) -> None:
    """Self-influence of every training example of one seed, after some labels were made wrong."""
    [index] = shard.items
    params, given = context.params, context.params.mislabelled
    assert given is not None
    seed, dtype = params.seeds[index], DTYPES[params.dtype]
    chosen = store.read_metadata(model_file(context, index))["chosen"]
    splits = open_splits(context, seed)
    assert isinstance(splits.train, ExampleBatch)
    wrong, labels = _wrong_labels(splits.train.targets, splits.num_outputs, given.share, seed)
    train = splits.train
    spoiled = type(splits)(
        ExampleBatch(train.ids, train.inputs, labels, train.likelihood),
        splits.validation,
        splits.test,
        splits.num_outputs,
    )
    model = build(params.network, spoiled, dtype, seed)
    rate, decay = chosen["learning_rate"], chosen["weight_decay"]
    fit(model, spoiled.train, params.training, rate, decay, params.training.epochs, seed)
    scores = _self_influence(context, subject_of(context, seed, spoiled, model), index)
    store.write_tensors(path, {"wrong": wrong, **scores})


def _wrong_labels(
    labels: Tensor, num_classes: int, share: float, seed: int
) -> tuple[Bool[Tensor, " n"], Tensor]:
    """Which labels are wrong, and all labels; a wrong one is any other class."""
    generator = random_generator(seed, "mislabelled")
    order = torch.randperm(len(labels), generator=generator)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[order[: round(share * len(labels))]] = True
    shift = torch.randint(1, num_classes, (len(labels),), generator=generator)
    return wrong, torch.where(wrong, (labels + shift) % num_classes, labels)


def _self_influence(
    context: BenchmarkContext, subject: Subject, index: int
) -> dict[str, Float[Tensor, " n"]]:
    """∇Lᵀ(G + λ)⁻¹∇L by method; with the loss itself, which needs no gradient, beside."""
    params = context.params
    batches = subject.batches()
    draws, seed = params.estimators.draws, params.seeds[index]
    fitted = fit_curvature(subject.model, subject.layers, batches, seed, draws)
    dampings = fitted.dampings(damping_of_seed(context, index, subject.train))
    blocks = {
        "diagonal": fit_diagonal(subject.model, subject.layers, batches, seed, draws),
        "kfac": fitted.kfac(),
        "ekfac": fitted.ekfac,
    }
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        ios = run_pass(subject.model, subject.layers, batch, training_loss)
        gradients = {name: io.gradient() for name, io in ios.items()}
        for method, by_layer in blocks.items():
            total = sum(
                (
                    block.basis.rotate(gradients[name]).square()
                    / (block.eigenvalues + dampings[name])
                ).sum(dim=(1, 2))
                for name, block in by_layer.items()
            )
            found.setdefault(method, []).append(torch.as_tensor(total))
        norms = sum(g.square().sum(dim=(1, 2)) for g in gradients.values())
        found.setdefault("gradient_dot", []).append(torch.as_tensor(norms))
        with torch.no_grad():
            losses = training_loss(forward(subject.model, batch), batch)
        found.setdefault("loss", []).append(losses)
    return {method: torch.cat(parts).double() for method, parts in found.items()}


def tuning_shard(context: BenchmarkContext, shard: ShardRef, path: Path) -> None:
    """f of the queries after a few steps on one example, less f before: [q, z] of the first seed.

    All parameters are trained, as a user who fine-tunes would, with plain gradient steps.
    """
    given = context.params.fine_tuning
    assert given is not None
    subject = open_subject(context, 0)
    start = {name: p.detach() for name, p in subject.model.named_parameters()}
    before = _f(subject, start)
    changes = []
    for place in shard.counted():
        example = subject.train.select(subject.places[[place]])
        here = dict(start)
        for _ in range(given.steps):
            leaves = {name: value.clone().requires_grad_() for name, value in here.items()}
            output = functional_call(subject.model, leaves, (example.inputs,))
            output = output if isinstance(output, Tensor) else output.logits
            loss = training_loss(output, example).sum() / len(example.owners)
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            here = {
                name: value - given.learning_rate * gradient
                for (name, value), gradient in zip(here.items(), gradients, strict=True)
            }
        changes.append(_f(subject, here) - before)
    store.write_tensors(path, {"change": torch.stack(changes, dim=1).double()})


@torch.no_grad()
def _f(subject: Subject, parameters: dict[str, Tensor]) -> Float[Tensor, " q"]:
    model: nn.Module = subject.model
    output = functional_call(model, parameters, (subject.queries.inputs,))
    output = output if isinstance(output, Tensor) else output.logits
    return -training_loss(output, subject.queries)
