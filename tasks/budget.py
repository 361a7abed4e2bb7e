"""Tokens of a batch, left to the machine: as many as make passes faster, and fit its memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from influence.layers import Layer
from influence.objectives import training_loss
from influence.passes import run_pass
from influence.sequences import TokenBatch
from tasks import store
from tasks.precision import devices_of
from tasks.progress import say

# More tokens than these make no pass faster. Powers of two, so that a little more or less of free
# memory gives the same batches, and with them the same bytes.
ENOUGH = {"cpu": 4096, "cuda": 65536}
SHARE = 0.5  # of the memory that is free: accumulators and other processes want some too


@dataclass(frozen=True, slots=True)
class Budget:
    """What was found: tokens of a batch, bytes that a pass holds for a token, and free bytes."""

    tokens: int
    bytes_per_token: int
    free_bytes: int


def remembered(file: Path, find: Callable[[], Budget]) -> int:
    """The tokens that `file` says were found, for a stage that resumes; found now if there is none.

    The process that starts a stage comes first, so that all its workers take the same.
    """
    if not file.is_file():
        found = find()
        store.write_json(file, asdict(found))
        say(
            f"batches of {found.tokens:,} tokens: a pass holds {found.bytes_per_token / 2**20:.3g} "
            f"MiB a token, and {found.free_bytes / 2**30:.3g} GiB are free"
        )
    return store.read_json(file)["tokens"]


def find_budget(
    model: nn.Module, layers: Sequence[Layer], length: int, device: str, workers: int
) -> Budget:
    """Probe with one sequence; on a GPU, also with a batch as large as was found.

    Args:
        model: in evaluation mode, in its place.
        layers: the attributed layers.
        length: tokens of the longest sequence.
        device: where passes run.
        workers: passes that share the memory.
    """
    first = devices_of(device)[0]
    kind = torch.device(first).type
    on_gpu, free = kind == "cuda", free_bytes(device)
    each = max(1, _held_bytes(model, layers, _probe(length, 1, first)) // length)
    tokens = fitting_tokens(kind, free, workers, each, length)
    while on_gpu and tokens > length and not _runs(model, layers, length, tokens, first):
        tokens //= 2
    return Budget(max(tokens, 1), each, free)


def fitting_tokens(kind: str, free: int, workers: int, each: int, length: int) -> int:
    """Tokens of a batch: a power of two of what fits, one sequence at least, and no more than make
    a pass faster.

    Args:
        kind: of the device, `cpu` or `cuda`.
        free: bytes.
        workers: passes that share them.
        each: bytes that a pass holds for a token.
        length: tokens of the longest sequence.
    """
    fits = int(SHARE * free / workers / each)
    return min(ENOUGH.get(kind, ENOUGH["cpu"]), max(length, 2 ** max(0, fits.bit_length() - 1)))


def free_bytes(device: str) -> int:
    """Memory that is free where passes run; of several devices, as if each had that of the fullest,
    since none can take what another lacks."""
    devices = devices_of(device)
    if torch.device(devices[0]).type == "cuda":
        return len(devices) * min(torch.cuda.mem_get_info(each)[0] for each in devices)
    return psutil.virtual_memory().available


def _probe(length: int, count: int, device: str) -> TokenBatch:
    supervised = torch.ones(count, length, dtype=torch.bool)
    supervised[:, 0] = False
    tokens = torch.zeros(count, length, dtype=torch.int64)
    return TokenBatch(torch.arange(count), tokens, supervised).to(device)


def _held_bytes(model: nn.Module, layers: Sequence[Layer], batch: TokenBatch) -> int:
    """What autograd keeps for the backward, and as much again for gradients on their way."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_pass(model, layers, batch, training_loss)
    return 2 * sum(kept.values())


def _runs(model: nn.Module, layers: Sequence[Layer], length: int, tokens: int, device: str) -> bool:
    try:
        run_pass(model, layers, _probe(length, tokens // length, device), training_loss)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
