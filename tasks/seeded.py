"""Random weights from a seed, whatever other threads do meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALONE = threading.RLock()  # PyTorch's default generator is one for all threads of a process


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside follows from `seed` alone, and nothing outside is changed by it.

    Shards of a stage are threads: two that draw at once would each take the other's numbers.
    """
    with _ALONE, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
