"""The machine that a run is planned for: this one, or one that is described."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "GB": 10**9, "TB": 10**12}
NUMBERS = ("tflops", "host_gflops", "disk_gbps", "devices")
SIZES = ("memory", "host_memory", "disk")
EXAMPLE = "tflops=400,memory=80GiB,disk_gbps=2,devices=8"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What passes, eigendecompositions and files have.

    Attributes:
        device_memory: bytes of one device that are free for a run; None: passes run on the host.
        host_memory: bytes that are free.
        disk: bytes that are free.
        flops: FLOP a second that matrix products sustain on one device; None: not known.
        host_flops: the same of the host in float64, for eigendecompositions; None: not known.
        disk_speed: bytes a second; None: not known, and not counted.
        devices: how many.
        told: in words.
    """

    device_memory: int | None
    host_memory: int
    disk: int
    flops: float | None
    host_flops: float | None
    disk_speed: float | None
    devices: int
    told: str

    @property
    def free(self) -> int:
        """Bytes where passes run."""
        return self.host_memory if self.device_memory is None else self.device_memory

    def as_one(self) -> "Hardware":
        """All devices as one, as a model that is spread over them has them: one computes, and the
        others wait for it."""
        assert self.device_memory is not None
        return replace(self, device_memory=self.devices * self.device_memory, devices=1)


def this_machine(root: Path, device: str) -> Hardware:
    """What is free here now.

    Args:
        root: the checkout, on whose disk artefacts lie.
        device: cpu, cuda or spread: all devices as one.
    """
    host, disk = psutil.virtual_memory().available, shutil.disk_usage(root).free
    if device == "cpu":
        return Hardware(None, host, disk, None, None, None, 1, "this machine")
    from tasks.budget import free_bytes  # torch is slow to import

    return Hardware(free_bytes(device), host, disk, None, None, None, 1, "this machine")


def described(text: str, here: Hardware) -> Hardware:
    """A machine from a line such as `tflops=400,memory=80GiB,disk_gbps=2,devices=8`.

    `tflops` is what matrix products sustain on one device, not what its data sheet promises;
    `memory` is of one device, `host_memory` and `disk` of the machine (those of `here` if they are
    not named), `host_gflops` what eigendecompositions sustain in float64, `disk_gbps` 10⁹ bytes a
    second.

    Raises:
        ValueError: naming the part that is no such figure.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or key not in (*NUMBERS, *SIZES) or key in found:
            known = ", ".join((*NUMBERS, *SIZES))
            raise ValueError(
                f"--hardware: given {part.strip()!r}, wanted each of {known} at most once, as in "
                f"{EXAMPLE!r}"
            )
        found[key] = _size(key, value) if key in SIZES else _number(key, value)
    missing = [key for key in ("tflops", "memory") if key not in found]
    if missing:
        raise ValueError(
            f"--hardware: {text!r} lacks {' and '.join(missing)}, without which nothing can be "
            f"told of that machine; write for example {EXAMPLE!r}"
        )
    host, speed = found.get("host_gflops"), found.get("disk_gbps")
    return Hardware(
        device_memory=int(found["memory"]),
        host_memory=int(found.get("host_memory", here.host_memory)),
        disk=int(found.get("disk", here.disk)),
        flops=found["tflops"] * 1e12,
        host_flops=None if host is None else host * 1e9,
        disk_speed=None if speed is None else speed * 1e9,
        devices=int(found.get("devices", 1)),
        told=text,
    )


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    whole = key != "devices" or value == int(value)
    if not 0 < value < float("inf") or not whole:
        wanted = "a whole number above 0" if key == "devices" else "a number above 0"
        raise ValueError(f"--hardware: {key}: given {text!r}, wanted {wanted}")
    return value


def _size(key: str, text: str) -> float:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", text)
    if not match or not float(match[1]):
        raise ValueError(
            f"--hardware: {key}: given {text!r}, wanted a size such as 80GiB ({', '.join(UNITS)})"
        )
    return float(match[1]) * UNITS[match[2]]
