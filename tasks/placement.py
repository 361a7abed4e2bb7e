"""One model over several devices: what is where, and activations that follow; door of accelerate.

What a part is called with is brought to where the part is, by a hook that runs before its forward
and so before all hooks that are hung on it later: these see what it computes with. (accelerate's
own hooks put another `forward` in the place of a module's, which a replica would share with the
original.)
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def placement(model: nn.Module, memory: Mapping[str, int]) -> dict[str, str]:
    """The device of each part of a model, such that about as much is on each and blocks stay whole.

    Args:
        model: of transformers, on any device.
        memory: bytes that are free, by device.

    Returns:
        Devices by the names of modules, or of parameters that belong to none of them.

    Raises:
        ValueError: if the weights do not fit, or the model does not say what its blocks are.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: list[str] = sorted(getattr(model, "_no_split_modules", None) or ())
    if not whole:
        raise ValueError(
            f"{type(model).__name__} does not say which of its modules must stay on one device "
            "(_no_split_modules), so it cannot be spread; write runtime.device: cuda"
        )
    devices, free = list(memory), dict[Any, Any](enumerate(memory.values()))
    balanced: Any = get_balanced_memory(model, dict(free), no_split_module_classes=whole)
    for wanted in (balanced, free):  # equal parts may be too much for one of unequal devices
        found: Any = infer_auto_device_map(model, dict(wanted), no_split_module_classes=whole)
        if set(found.values()) <= set(free):  # else some of it would go to the host or its disk
            return {name: devices[number] for name, number in found.items()}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    told = ", ".join(f"{each / 2**30:.3g}" for each in free.values())
    raise ValueError(
        f"the model's weights take {weights / 2**30:.3g} GiB and do not fit on {len(devices)} "
        f"devices with {told} GiB free (blocks stay whole, and the first device keeps room for "
        "the largest part); give a worker more of them, or take a narrower runtime.dtype"
    )


def spread(model: Model, where: Mapping[str, str]) -> Model:
    """The model with each part on its device, in place.

    Args:
        model: whose replicas, made later, will be on the same devices.
        where: as `placement` gives it.
    """
    for name, device in where.items():
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        part: Any = getattr(owner, last) if name else model
        if isinstance(part, nn.Module):
            part.to(device)
            for called in _called(part):
                called.register_forward_pre_hook(partial(_brought, device), with_kwargs=True)
        else:
            moved = part.detach().to(device)
            is_parameter = isinstance(part, nn.Parameter)
            setattr(owner, last, nn.Parameter(moved, part.requires_grad) if is_parameter else moved)
    return model


def _called(part: nn.Module) -> Iterator[nn.Module]:
    """The modules that are called for a part: a list of blocks is not, but each block of it."""
    if isinstance(part, nn.ModuleList | nn.ModuleDict):
        for child in part.children():
            yield from _called(child)
    else:
        yield part


def _brought(
    device: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from accelerate.utils import send_to_device

    brought: Any = send_to_device((args, kwargs), device)
    return brought
