"""LoRA adapters beside the model that they adapt; the only door to peft.

Weights are read from safetensors alone. The adapter is not merged: its matrices stay linear layers
of their own, which scores can speak for (`layers: [adapter]`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks import store

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, as peft's `save_pretrained` writes one."""
    return (folder / CONFIG).is_file()


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Put LoRA's matrices beside the model's own, in place; all in the dtype of the model.

    Raises:
        ValueError: no adapter there, one of another kind than plain LoRA, weights that are not in
            safetensors, or that do not belong to this model; or peft is not installed.
    """
    peft = peft_module()
    config = _config(peft, folder)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder}: no {WEIGHTS} there; only safetensors are read (a .bin file can run code "
            "when it is loaded): save the adapter with save_pretrained(folder)"
        )
    _inject(peft, config, model, folder)
    result = peft.set_peft_model_state_dict(model, store.read_tensors(folder / WEIGHTS))
    # peft only warns here, and goes on with random weights.
    lacking = [name for name in result.missing_keys if "lora_" in name or "_to_save" in name]
    for complaint, names in (("lacks", lacking), ("has unknown", result.unexpected_keys)):
        if names:
            raise ValueError(
                f"{folder}: the adapter {complaint} the weights {sorted(names)[:3]}; is the base "
                "the model that it was trained on?"
            )
    dtype = next(model.parameters()).dtype
    model.to(dtype)


def add_shapes(model: nn.Module, folder: Path) -> None:
    """The same matrices without numbers, beside a model on the device `meta`, from the adapter's
    configuration alone.

    Raises:
        ValueError: as `add_adapter`, but for its weights, which need not be there.
    """
    peft = peft_module()
    config = _config(peft, folder)
    config.init_lora_weights = False  # some ways to begin decompose the weights of the base
    with torch.device("meta"):
        _inject(peft, config, model, folder)


def _inject(peft: Any, config: Any, model: nn.Module, folder: Path) -> None:
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"{folder}: does not fit the base model ({error})") from error
    _check_plain(model, folder)


def _config(peft: Any, folder: Path) -> Any:
    if not is_adapter(folder):
        raise ValueError(
            f"{folder}: no adapter there; a folder with {CONFIG} and {WEIGHTS} is wanted, as "
            "peft's save_pretrained writes it"
        )
    kind = store.read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder}: the adapter is of the kind {kind!r}; LORA alone is supported")
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"{folder}: the adapter adapts parameters ({', '.join(config.target_parameters)}), "
            "not linear layers; train it with target_modules"
        )
    return config


def _check_plain(model: nn.Module, folder: Path) -> None:
    """A variant (DoRA, …) uses the matrices for more than a product with the layer's input."""
    for name, module in model.named_modules():
        variants: Any = getattr(module, "lora_variant", None)
        if variants:
            raise ValueError(
                f"{folder}: layer {name!r} is adapted by a variant of LoRA "
                f"({', '.join(type(one).__name__ for one in variants.values())}), "
                "whose gradient is not that of a linear layer; plain LoRA alone is supported"
            )


def peft_module() -> Any:
    """The package peft.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "train.checkpoint.adapter: peft is not installed; pip install 'influence[peft]'"
        ) from error
    return peft
