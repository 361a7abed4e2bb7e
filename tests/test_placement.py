"""A model over several devices: what goes where, that it fits, and every phase of the mathematics.

No GPU is needed but in one test: where a model goes follows from sizes, and devices may be such as
only say that they are two (`tests/devices.py`). Stages: `tests/test_curvature_stages.py`.
"""

import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from influence.damping import RelativeDamping
from influence.experts import separate_experts
from influence.layers import find_layers
from influence.queries import Method, Query, prepare_queries
from influence.solver import GradientDot
from tasks.layergroups import factor_bytes, layer_memory, on_fullest
from tasks.models import load_model, replicate, without_weights
from tasks.params import Runtime
from tasks.placement import placement, spread
from tasks.planning.hardware import Hardware
from tasks.precision import devices_of
from tasks.query import describe
from tasks.querysets import QueryText
from tests.devices import pretended, spread_over_two
from tests.influence import mixtures, models
from tests.influence.test_accelerator import phases
from tests.small_run import MODEL, SECTIONS

GPUS = ("cuda:0", "cuda:1", "cuda:2")


def bytes_of(model: nn.Module, where: dict[str, str]) -> dict[str, int]:
    """Weights by device; each parameter must be in one part and no other."""
    found = dict.fromkeys(where.values(), 0)
    for name, parameter in model.named_parameters():
        [part] = [part for part in where if f"{name}.".startswith(f"{part}.")]
        found[where[part]] += parameter.nbytes
    return found


@pytest.mark.parametrize("devices", [GPUS[:2], GPUS])
def test_blocks_stay_whole_and_each_device_gets_its_part(devices):
    model = without_weights(MODEL)
    where = placement(model, dict.fromkeys(devices, 2**30))
    assert set(where.values()) == set(devices)
    assert not [name for name in where if re.search(r"layers\.\d+\.", name)]
    assert where["model.embed_tokens"] == where["lm_head"], "one weight, used twice"
    weights = bytes_of(model, where)
    assert max(weights.values()) < 0.75 * sum(weights.values())
    order = [where[f"model.layers.{number}"] for number in range(5)]
    assert order == sorted(order), "an activation crosses a border once"


def test_a_device_with_less_memory_gets_less():
    model = without_weights(MODEL)
    size = sum(parameter.nbytes for parameter in model.parameters())
    weights = bytes_of(model, placement(model, {"cuda:0": size, "cuda:1": size // 3}))
    assert weights["cuda:1"] <= size // 3 < weights["cuda:0"]


def test_a_model_that_does_not_fit_says_what_there_is_and_what_to_do():
    model = without_weights(MODEL)
    complaint = (
        r"weights take 0.000969 GiB and do not fit on 2 devices with 0.000244, 0.000122 GiB free "
        r".*give a worker more of them, or take a narrower runtime\.dtype"
    )
    with pytest.raises(ValueError, match=complaint):
        placement(model, {"cuda:0": 2**18, "cuda:1": 2**17})


def test_a_model_that_does_not_tell_its_blocks_is_not_spread():
    with pytest.raises(ValueError, match=r"Linear does not say which .*runtime\.device: cuda"):
        placement(nn.Linear(2, 2), dict.fromkeys(GPUS, 2**30))


def test_spread_is_all_gpus_of_the_process_or_an_error_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"runtime\.device` is spread, but .* no GPU"):
        devices_of("spread")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("spread") == list(GPUS)
    assert devices_of("cuda") == ["cuda"]


def test_a_parameter_that_is_no_part_of_a_module_moves_too():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)

    model = spread(Scaled(), {"scale": "meta", "linear": "cpu"})
    assert (model.scale.device.type, model.linear.weight.device.type) == ("meta", "cpu")


@pytest.fixture
def two(monkeypatch) -> Iterator[tuple[str, str]]:
    with spread_over_two(monkeypatch) as devices:
        yield devices


def test_a_replica_computes_on_the_same_devices_and_keeps_no_second_weights(two):
    tokens = torch.tensor([[1, 403, 407]])
    wanted = load_model(MODEL, "cpu", torch.float32)(tokens).logits
    model = load_model(MODEL, "spread", torch.float32)
    replica = replicate(model)
    assert {str(parameter.device) for parameter in model.parameters()} == set(two)
    for one, other in zip(model.parameters(), replica.parameters(), strict=True):
        assert one is other
    seen = []
    model.model.layers[4].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(replica(tokens).logits.cpu(), wanted)
    assert not seen, "a replica runs modules of its own"


def test_memory_for_layers_is_that_of_the_fullest_device(two):
    model = load_model(MODEL, "spread", torch.float32)
    layers, _ = find_layers(model, ("mlp",))
    by_device = [[each for each in layers if str(each.device) == device] for device in two]
    assert all(by_device)
    assert on_fullest(factor_bytes, layers) == max(map(factor_bytes, by_device))
    runtime = Runtime.model_validate(SECTIONS["runtime"] | {"layer_memory": 1})
    assert layer_memory(runtime, "cpu") == 2 * layer_memory(runtime, "spread") == 2**30


def test_devices_as_one_have_the_memory_of_all_and_the_speed_of_one():
    eight = Hardware(80, 1, 1, 4e14, None, None, 8, "eight")
    assert (eight.as_one().device_memory, eight.as_one().devices) == (640, 1)


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")

# Of each part, on which of two devices it is.
SPREAD = {
    "gpt2": {
        "transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.h.0": 0,
        "transformer.h.1": 1, "transformer.ln_f": 1, "lm_head": 0,
    },
    "mlp": {"embedding": 0, "block": 1, "head": 0},
    "mixtral": {
        "model.embed_tokens": 1, "model.layers.0": 1, "model.layers.1": 0, "model.norm": 0,
        "model.rotary_emb": 0, "lm_head": 0,
    },
}  # fmt: skip


def built(case: str) -> nn.Module:
    """A model with something on either side of a border."""
    made = {
        "gpt2": lambda: models.gpt2(num_layers=2),
        "mlp": models.mlp,
        "mixtral": lambda: mixtures.fused("mixtral", num_layers=2),
    }
    model: Any = made[case]()
    if hasattr(model, "config"):  # as a model is loaded
        model.config.use_cache = False
    return model


def spread_model(case: str, devices: Sequence[str]) -> nn.Module:
    return spread(built(case), {name: devices[place] for name, place in SPREAD[case].items()})


@pytest.mark.parametrize("case", SPREAD)
def test_a_model_over_two_devices_gives_the_very_bits_of_one(case):
    wanted = phases(separate_experts(built(case)))
    with pretended() as devices:
        got = phases(separate_experts(spread_model(case, devices)))
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, wanted[name]), name


def test_an_expert_that_no_query_runs_has_its_zeros_where_it_is():
    with pretended() as devices:
        model = separate_experts(spread_model("mixtral", devices))
        layers, _ = find_layers(model, ("mlp",))
        asked = [Query("short", (1,), (2,))]
        dots = Method({layer.name: GradientDot() for layer in layers}, RelativeDamping(0.1))
        prepared = prepare_queries(model, layers, asked, {"dot": dots}, None, 9)["dot"]
        idle = [layer for layer in layers if not prepared[layer.name].left.any()]
        assert {str(layer.device) for layer in idle} == set(devices)
        assert all(prepared[layer.name].left.device == layer.device for layer in layers)


def test_what_a_query_measures_is_measured_where_the_outputs_are():
    asked = QueryText("q", "", "", {}, (1, 2), (3, 4))

    def measured(model: nn.Module, device: str) -> object:
        there: Any = SimpleNamespace(model=model)
        reference: Any = SimpleNamespace(attributed=lambda: there, input_device=device)
        return describe([asked], reference)[0]["log_probability"]

    with pretended() as devices:
        found = measured(spread_model("mixtral", devices), devices[1])
    assert found == measured(built("mixtral"), "cpu")


@needs_two
@pytest.mark.parametrize("case", SPREAD)
def test_a_model_over_two_gpus_gives_the_numbers_of_the_cpu(case):
    wanted = phases(separate_experts(built(case)))
    got = phases(separate_experts(spread_model(case, ("cuda:0", "cuda:1"))))
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-10, msg=name)
