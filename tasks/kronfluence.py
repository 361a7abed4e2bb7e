"""EK-FAC that kronfluence 1.0.1 (Bae 2024) fitted, read from the folder where it left it.

`<output_dir>/<analysis>/factors_<name>/` holds a file of tensors a kind, and in it a tensor a
layer, under the layer's name in the model. Eigenvectors are in columns, the gradient of a layer is
(d_out, d_in), the 1 of a bias is the last input: as here. Λ is a sum, and its count beside it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from influence.eigenbasis import EigenBasis
from influence.ekfac import EKFACBlock
from influence.layers import Layer
from tasks import store

ARGUMENTS = "factor_arguments.json"
Q_A, Q_S = "activation_eigenvectors", "gradient_eigenvectors"
SUM, COUNT = "lambda_matrix", "num_lambda_processed"
KINDS = (Q_A, Q_S, SUM, COUNT)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHOWN = 8  # names in a message


def read_kronfluence(folder: Path, layers: Sequence[Layer]) -> dict[str, EKFACBlock]:
    """(Q_A ⊗ Q_S) diag(Λ) (Q_A ⊗ Q_S)ᵀ of every layer, in its weight's dtype and on its device.

    Its G is ours if its loss was a sum over tokens, each example a sequence. A `Conv1D` takes what
    was fitted on the `nn.Linear` that stood in its place.

    Args:
        folder: `factors_<name>`, as `Analyzer.fit_all_factors` leaves it.
        layers: of the model that was fitted; others in the folder are left aside.

    Raises:
        ValueError: if the folder is not one of EK-FAC fitted with sampled labels, lacks a file or
            a layer, or holds tensors of another shape, that are not finite, or of no example.
    """
    _check_folder(folder)
    _check_layers(folder, layers)
    return {layer.name: _block(folder, layer) for layer in layers}


def _check_folder(folder: Path) -> None:
    """Whether the files are there, and are of EK-FAC with labels that the model drew."""
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    if ARGUMENTS in names:
        _check_arguments(folder / ARGUMENTS)
    missing = [name for name in (ARGUMENTS, *map(_file, KINDS)) if name not in names]
    if not missing:
        return
    remedy = "give the folder factors_<name> that kronfluence's Analyzer.fit_all_factors wrote"
    if inside := [name for name in names if name.startswith("factors_")]:
        remedy = f"give one of the folders in it: {', '.join(inside)}"
    elif any(name.startswith(f"{SUM}_data_partition") for name in names):
        remedy = (
            "Λ is there in partitions only: fit those that lack, and kronfluence's "
            "Analyzer.aggregate_lambda_matrices adds them up"
        )
    raise ValueError(f"{folder} lacks {', '.join(missing)} of kronfluence; {remedy}")


def _check_arguments(path: Path) -> None:
    arguments = store.read_json(path)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{path}: a JSON {type(arguments).__name__}; kronfluence's arguments by name are wanted"
        )
    if (strategy := arguments.get("strategy")) != "ekfac":
        raise ValueError(
            f"{path}: the strategy is {strategy!r}, whose factors have no corrected eigenvalues in "
            'an eigenbasis; fit with FactorArguments(strategy="ekfac")'
        )
    if arguments.get("use_empirical_fisher"):
        raise ValueError(
            f"{path}: use_empirical_fisher is true, so that Λ is of the training labels, not of "
            "the Gauss-Newton Hessian; fit with use_empirical_fisher=False"
        )


def _check_layers(folder: Path, layers: Sequence[Layer]) -> None:
    """Whether every layer is in every file."""
    found = set.intersection(*(set(store.tensor_names(_path(folder, kind))) for kind in KINDS))
    missing = [layer for layer in layers if layer.name not in found]
    if not missing:
        return
    remedy = "name them in get_influence_tracked_modules and fit again, or attribute others"
    if any(type(layer.module).__name__ == "Conv1D" for layer in missing):
        remedy += "; kronfluence tracks no Conv1D: fit on an nn.Linear with its weight transposed"
    raise ValueError(
        f"{folder} has no factors of {_listed([layer.name for layer in missing])}; it has those of "
        f"{_listed(sorted(found))}; {remedy}"
    )


def _block(folder: Path, layer: Layer) -> EKFACBlock:
    weight = next(layer.module.parameters())
    basis = EigenBasis(
        _read(folder, Q_A, layer, (layer.d_in, layer.d_in)),
        _read(folder, Q_S, layer, (layer.d_out, layer.d_out)),
    )
    squares = _read(folder, SUM, layer, (layer.d_out, layer.d_in))
    eigenvalues = (squares.double() / _count(folder, layer)).to(weight)
    return EKFACBlock(basis.to(weight.dtype, weight.device), eigenvalues)


def _count(folder: Path, layer: Layer) -> int:
    """The examples that Λ of a layer is a sum over."""
    path = _path(folder, COUNT)
    count = store.read_tensor(path, layer.name)
    if count.numel() != 1 or count.is_complex() or float(count.double()) % 1 != 0:
        raise ValueError(
            f"{path}: {layer.name!r} is {_shape(count.shape)} ({count.dtype}); the number of "
            "examples is wanted"
        )
    if int(count) < 1:
        raise ValueError(f"{path}: {layer.name!r} was fitted on {int(count)} examples; fit Λ again")
    return int(count)


def _read(folder: Path, kind: str, layer: Layer, wanted: tuple[int, ...]) -> Tensor:
    """One tensor of the shape wanted, all of it finite."""
    path = _path(folder, kind)
    found = store.tensor_shape(path, layer.name)
    if found != wanted:
        raise ValueError(
            f"{path}: {layer.name!r} is {_shape(found)}, and {_shape(wanted)} in the model"
            f"{_about_bias(layer, found) if kind == Q_A else ''}; give the factors of this model"
        )
    tensor = store.read_tensor(path, layer.name)
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{path}: {layer.name!r} holds {tensor.dtype}; {', '.join(map(str, FLOATS))} are "
            "wanted: fit again in float32"
        )
    if not tensor.isfinite().all():
        raise ValueError(
            f"{path}: {layer.name!r} holds NaN or infinity; the pass that fitted it overflowed: "
            "fit again in float32"
        )
    return tensor


def _about_bias(layer: Layer, found: tuple[int, ...]) -> str:
    """What one input more or less means."""
    fewer, more = ((layer.d_in + by,) * 2 for by in (-1, 1))
    if layer.has_bias and found == fewer:
        return " (it was fitted without the bias that the layer has)"
    if not layer.has_bias and found == more:
        return " (it was fitted with a bias, and the layer has none)"
    return ""


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes)) or "a single number"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "") or "no layer"


def _path(folder: Path, kind: str) -> Path:
    return folder / _file(kind)


def _file(kind: str) -> str:
    return f"{kind}.safetensors"
