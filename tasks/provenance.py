"""The header that every result carries: what the numbers speak for, and in which unit."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks import store
from tasks.attributed import PassReference
from tasks.workspace import StageContext

SIGN = "positive: one more copy of the sequence in training raises log p(completion | prompt)"
UNIT = "nats of log p(completion | prompt) per extra copy of the sequence in training"
LABELS = "labels sampled from the model (true Fisher), one a token"


def header(context: StageContext, reference: PassReference) -> dict[str, object]:
    """Model, corpus, coverage, sign, unit, N, damping, labels and digests of what went in."""
    params = context.params
    corpus = store.read_json(context.artifact("tokenize") / "summary.json")
    layers = store.read_json(context.artifact("factors") / "layers.json")
    damping = store.read_json(context.artifact("query") / "damping.json")
    names = [layer["name"] for layer in layers["layers"]]
    idle = [layer for layer in layers["layers"] if layer["name"] not in damping]
    model = reference.model
    inputs = {
        "model": model.digest,
        "tokens": store.digest(context.artifact("tokenize") / "tokens.safetensors"),
        "factors": store.digest(context.artifact("factors") / "factors.safetensors"),
        "spectrum": store.digest(context.artifact("correct") / "spectrum.safetensors"),
        "queries": store.digest(context.artifact("query") / "prepared.safetensors"),
    }
    return {
        "run": context.run,
        "model": {
            "source": model.name,
            "kind": model.source,
            "parameters": model.num_parameters,
            "digest": model.digest,
        },
        "corpus": {**corpus.pop("corpus"), **corpus},
        "num_training_sequences": corpus["num_sequences"],
        "sign": SIGN,
        "unit": UNIT,
        "label_source": LABELS,
        "layers": names,
        "coverage": without(layers["coverage"], idle),
        "fit": {
            "factors": layers["num_sequences"],
            "tokens": layers["num_tokens"],
            "spectrum": min(params.correct.sequences, corpus["num_sequences"]),
        },
        "damping": {"rule": params.query.damping.model_dump(), "layers": damping},
        "rank": params.query.rank,
        "filter": params.filter.model_dump(),
        "fingerprint": context.fingerprint,
        "digests": inputs,
    }


def without(coverage: dict[str, Any], unreached: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coverage less the experts of which the fit saw no gradient: they add nothing to a score.

    Args:
        coverage: as `factors` wrote it.
        unreached: their layers, as `factors` wrote them.
    """
    reason = "no token of the fit reached this expert"
    idle = {layer["name"]: layer["d_in"] * layer["d_out"] for layer in unreached}
    num_attributed = coverage["num_attributed"] - sum(idle.values())
    return {
        **coverage,
        "share": num_attributed / coverage["num_parameters"],
        "num_attributed": num_attributed,
        "attributed": [name for name in coverage["attributed"] if name not in idle],
        "left_out": [
            *coverage["left_out"],
            *({"name": n, "num_parameters": k, "reason": reason} for n, k in idle.items()),
        ],
    }
