"""Two devices that are not there, so that what is spread over devices can be tested on any machine.

A tensor on one of them holds its numbers on the CPU and says that it is elsewhere. As with real
devices, tensors of two of them do not meet in any operation but a copy, forward or backward. (Those
of torch's FakeTensorMode do not meet either, but have no numbers.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from tasks import attributed, budget, layergroups, models, shards

DEVICES = ("cpu:1", "cpu:2")  # torch has no such CPUs, but lets tensors of a class of ours say so
HOST = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


@contextmanager
def pretended() -> Iterator[tuple[str, str]]:
    """Within it, tensors are made on, and moved to, the `DEVICES`."""
    with _Pretence():
        yield DEVICES


@contextmanager
def spread_over_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Within it, `runtime.device: spread` is over the `DEVICES`, in this thread."""
    with pretended() as devices:

        def those(device: str) -> list[str]:
            return list(devices) if device == "spread" else [device]

        for module in (attributed, budget, layergroups, models):
            monkeypatch.setattr(module, "devices_of", those)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**30))
        monkeypatch.setattr(shards, "_run_threads", lambda jobs, _: [job.run() for job in jobs])
        yield devices


class Elsewhere(Tensor):
    """A tensor on a device that is not there."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=device,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held}, {self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: Any, device: Any, size: Any, stride: Any) -> "Elsewhere":
        return Elsewhere(inner["held"], device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Pretence(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the CPU computes, on the device where it would be."""
    here = _place(func, args, kwargs)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": HOST}
    out = func(*_plain(args), **_plain(kwargs))
    if here == HOST:
        return args[0] if func is aten.copy_.default else out
    out = tree_map_only(Tensor, lambda each: Elsewhere(each, here), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _place(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    asked = kwargs.get("device")
    if func in COPIES:
        return args[0].device if asked is None else torch.device(asked)
    met = [args[0]] if func in INDEXING else (args, kwargs)  # indices may be on the host
    met = [each for each in tree_leaves(met) if isinstance(each, Tensor)]
    if func in INDEXING:
        others = [each for each in tree_leaves(args[1:]) if isinstance(each, Tensor)]
        met += [each for each in others if each.device != HOST]
    devices = {each.device for each in met if each.ndim or each.device != HOST}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(map(str, devices)))} meet")
    return torch.device(asked) if asked is not None else next(iter(devices), HOST)


def _plain(given: Any) -> Any:
    return tree_map(lambda each: each.held if isinstance(each, Elsewhere) else each, given)
