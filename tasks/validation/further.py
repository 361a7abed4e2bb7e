"""What the further ground truths say: retrained subsets, wrong labels, single examples."""

from statistics import mean
from typing import Any

import torch

from influence.statistics import Agreement
from influence.validation.lds import datamodeling_score, noise_ceiling
from tasks import store
from tasks.validation.comparing import Compared, Phases, correlation, of_values
from tasks.validation.outcome import Found, Retrained
from tasks.validation.settings import METHODS

SHARES = (0.1, 0.2)  # of the examples, highest self-influence first, that are looked through


def retrained(given: Any, phases: Phases) -> Retrained | None:
    """The linear datamodeling score of every method; None if nothing was retrained."""
    if not phases.retrained:
        return None
    parts = [store.read_tensors(path) for path in phases.retrained]
    f = torch.cat([part["f"] for part in parts])
    subsets = torch.cat([part["subsets"] for part in parts])
    scores = {
        name: of_values(datamodeling_score(values, subsets, f))
        for name, values in phases.scores[0].items()
        if name in METHODS
    }
    told = [store.read_metadata(path)["seconds"] for path in phases.retrained]
    ceiling = of_values(noise_ceiling(f))
    return Retrained(scores, ceiling, given.subsets, given.seeds, sum(told))


def mislabelled(phases: Phases) -> Found | None:
    """How many of the wrong labels self-influence finds; None if none were made."""
    if not phases.mislabelled:
        return None
    found: dict[str, dict[str, list[float]]] = {}
    total = 0
    for path in phases.mislabelled:
        tensors = store.read_tensors(path)
        wrong = tensors.pop("wrong")
        total += int(wrong.sum())
        for method, scores in tensors.items():
            order = scores.argsort(descending=True, stable=True)
            for share in SHARES:
                top = order[: round(share * len(order))]
                kept = float(wrong[top].sum() / wrong.sum())
                found.setdefault(method, {}).setdefault(f"{share:g}", []).append(kept)
    means = {
        method: {share: mean(values) for share, values in by_share.items()}
        for method, by_share in found.items()
    }
    return Found(total, means)


def fine_tuned(compared: Compared, phases: Phases) -> dict[str, Agreement] | None:
    """Agreement with a few steps on single examples; None if none were taken."""
    if not phases.tuned:
        return None
    change = store.read_tensor(phases.tuned[0], "change")
    places = compared.places[0][: change.shape[1]]
    found = {
        name: correlation(scores[:, places], change)
        for name, scores in phases.scores[0].items()
        if name in METHODS
    }
    truth = phases.responses[0][f"response/{compared.epsilon}"][:, : change.shape[1]]
    return found | {"pbrf": correlation(truth, change)}
