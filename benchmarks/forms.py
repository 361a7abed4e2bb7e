"""Is the form that the cost model chooses the cheapest? Each is timed over a grid of shapes.

`python -m benchmarks.forms` prints a JSON line for each shape: seconds by form, and the chosen one.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.clock import seconds
from influence.capture import LayerIO
from influence.contraction import ByToken, forms_gradients, meet
from influence.eigenbasis import EigenBasis
from influence.lowrank import LowRank

TIE = 1.1  # forms that differ by less are equally cheap


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer, a batch and its queries."""

    length: int
    d_in: int
    d_out: int
    queries: int
    rank: int
    sequences: int = 4


# Widths of small and middling models, short and long sequences, few and many queries.
GRID = (
    Shape(16, 256, 256, 4, 8, 32),
    Shape(64, 256, 1024, 8, 32, 8),
    Shape(128, 512, 2048, 8, 32),
    Shape(128, 2048, 512, 64, 32),
    Shape(128, 768, 768, 2, 16),
    Shape(512, 256, 1024, 8, 32),
    Shape(512, 512, 2048, 8, 32, 2),
    Shape(512, 512, 512, 64, 32, 2),
    Shape(1024, 512, 512, 16, 16, 1),
    Shape(1024, 256, 1024, 128, 32, 1),
)
Forms = Mapping[str, Callable[[], object]]


def contractions(shape: Shape) -> tuple[str, Forms]:
    """Queries meet tokens, or gradients that are formed; and which is chosen."""
    io, query = _io(shape), _queries(shape)
    by_token, dense = ByToken.of(query, has_bias=False), query.dense()
    chosen = forms_gradients(query, shape.length, float("inf"))
    return "formed" if chosen else "by token", {
        "by token": lambda: by_token(io),
        "formed": lambda: meet(dense, io.gradient()),
    }


def rotations(shape: Shape) -> tuple[str, Forms]:
    """Each side is rotated before the sum over tokens or after it; and which way is chosen."""
    io = _io(shape)
    Q_A, Q_S = (torch.linalg.qr(_random(d, d))[0] for d in (shape.d_in, shape.d_out))
    basis = EigenBasis(Q_A, Q_S)

    def rotated(inputs_first: bool, outputs_first: bool) -> Callable[[], object]:
        def call() -> object:
            a = io.a @ Q_A if inputs_first else io.a
            ds = io.ds @ Q_S if outputs_first else io.ds
            G = ds.mT @ a
            G = G if inputs_first else G @ Q_A
            return G if outputs_first else Q_S.mT @ G

        return call

    first = basis.rotates_inputs_first(shape.length), basis.rotates_outputs_first(shape.length)
    ways = {
        _way(inputs, outputs): rotated(inputs, outputs)
        for inputs in (True, False)
        for outputs in (True, False)
    }
    return _way(*first), ways


def _way(inputs_first: bool, outputs_first: bool) -> str:
    told = {True: "tokens", False: "gradient"}
    return f"inputs of {told[inputs_first]}, outputs of {told[outputs_first]}"


DECISIONS: Mapping[str, Callable[[Shape], tuple[str, Forms]]] = {
    "contraction": contractions,
    "rotation": rotations,
}


def measured(decision: str, shape: Shape, repeats: int = 5) -> dict[str, Any]:
    """Median seconds of each form, in turn within a repeat; the chosen over the cheapest."""
    chosen, forms = DECISIONS[decision](shape)
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(-1, repeats):
        for name, form in forms.items():
            once = seconds(form)
            if number >= 0:
                taken[name].append(once)
    cost = {name: statistics.median(each) for name, each in taken.items()}
    over = cost[chosen] / min(cost.values())
    return {"decision": decision, **asdict(shape), "seconds": cost, "chosen": chosen, "over": over}


def all_measured(repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Every decision at every shape of the grid."""
    for decision in DECISIONS:
        for shape in GRID:
            yield measured(decision, shape, repeats)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _io(shape: Shape) -> LayerIO:
    size = shape.sequences, shape.length
    return LayerIO(_random(*size, shape.d_in), _random(*size, shape.d_out), has_bias=False)


def _queries(shape: Shape) -> LowRank:
    return LowRank(
        _random(shape.queries, shape.d_out, shape.rank),
        _random(shape.queries, shape.rank, shape.d_in),
    )


def main() -> None:
    """Print a line for each, and how often the choice was the cheapest."""
    torch.set_num_threads(1)
    found = []
    for line in all_measured():
        found.append(line)
        print(json.dumps(line), flush=True)
    for decision in DECISIONS:
        overs = [line["over"] for line in found if line["decision"] == decision]
        cheapest = sum(over <= TIE for over in overs)
        print(json.dumps({"decision": decision, "cheapest": cheapest, "of": len(overs)}))


if __name__ == "__main__":
    main()
