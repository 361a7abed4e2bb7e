"""A model over several devices: what goes where, that it fits, and whole stages with it.

No GPU is needed: where a model goes follows from sizes, and stages run on two devices that only say
that they are two (`tests/devices.py`). Phases on real GPUs: `tests/influence/test_accelerator.py`.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from influence.layers import find_layers
from tasks import attributed, budget, layergroups, models, shards, store
from tasks.layergroups import factor_bytes, layer_memory, on_fullest
from tasks.models import load_model, replicate, without_weights
from tasks.params import Runtime
from tasks.placement import placement, spread
from tasks.planning.hardware import Hardware
from tasks.precision import devices_of
from tests.devices import pretended
from tests.small_run import MODEL, SECTIONS
from tests.test_curvature_stages import make

GPUS = ("cuda:0", "cuda:1", "cuda:2")
RUNTIME = SECTIONS["runtime"] | {"shards": 1, "layer_memory": 4e-3}  # several groups of layers
RUN = {"stream": {"self_influence": True, "subspace": None}, "runtime": RUNTIME}


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


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A small run on one device."""
    return make(tmp_path_factory.mktemp("one"), **RUN)


@pytest.fixture
def two(one, monkeypatch):
    """Two devices for `spread`, in this thread."""
    with pretended() as devices:

        def those(device: str) -> list[str]:
            return list(devices) if device == "spread" else [device]

        for module in (attributed, budget, layergroups, models):
            monkeypatch.setattr(module, "devices_of", those)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**30))
        monkeypatch.setattr(shards, "_run_threads", lambda jobs, _: [job.run() for job in jobs])
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


def test_stages_over_two_devices_write_the_bytes_of_one(one, two, tmp_path):
    """From `train` to `score`, with self-influence and several groups of layers."""
    both = make(tmp_path, **RUN | {"runtime": RUNTIME | {"device": "spread"}})
    files = {
        file.relative_to(one)
        for file in one.rglob("*")
        if file.suffix in (".safetensors", ".parquet") and file.is_file()
    }
    assert {file.parts[0] for file in files} >= {"factors", "eigen", "correct", "query", "stream"}
    for file in sorted(files):
        assert store.digest(both / file) == store.digest(one / file), file


def test_devices_as_one_have_the_memory_of_all_and_the_speed_of_one():
    eight = Hardware(80, 1, 1, 4e14, None, None, 8, "eight")
    assert (eight.as_one().device_memory, eight.as_one().devices) == (640, 1)
