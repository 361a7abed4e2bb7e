"""Command: what each phase costs, a JSON line each.

One line holds the phase, the median ratio to a forward and backward of training (fb, a token), its
smallest and largest, and with `--memory` the peak above the model and what the phase is given.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from benchmarks import clock, models, scale, table
from benchmarks.phases import PHASES, WAITING, Setting, disk_mib, ours, shared_lost, unit

PEER = "peer: "
WARM_UP_TOKENS = 2**14  # beside more, what is made at first use costs little
PROCESSES = 3  # whose peak memory is asked
WAITS = ("stream 64", "stream 1024")  # whose gradients wait for many queries
PEERS = {  # and the phases that each has
    "kronfluence": ("factors", "lambda", "self", "query", "stream 8", "stream 64", "stream 1024"),
    "bergson": ("factors", "lambda", "stream 8 full"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if not given.repeats and not given.memory:
        parser.error("--repeats 0 measures no times; add --memory, or repeat at least once")
    torch.set_num_threads(given.threads)
    if given.without_onednn:
        torch.backends.mkldnn.set_flags(False)
    if given.scale:
        scale.main(table.ROOT if given.keep else None)
        return
    shape = models.shape_of(given.model)
    setting = Setting(
        shape, given.length, given.sequences, tuple(given.layers), given.queries, given.batch,
        given.made_up, given.waiting,
    )  # fmt: skip
    if given.memory_of:
        print(json.dumps(_peak(setting, given.memory_of)))
        return
    about = {
        "model": given.model, "length": given.length, "layers": given.layers,
        "sequences": given.sequences,
        "machine": table.machine(), "threads": given.threads,
    }  # fmt: skip
    if given.repeats:
        about["repeats"] = given.repeats
    if given.peer:
        about["peer"] = given.peer
    if given.without_onednn:
        about["without_onednn"] = True
    lines = []
    for line in measured(setting, given):
        lines.append(about | line)
        print(json.dumps(lines[-1], ensure_ascii=False), flush=True)
    if given.keep:
        table.keep(table.ROOT, lines)
        table.write(table.ROOT)


def measured(setting: Setting, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each phase; with a peer, how far it agrees and what both would write."""
    names = given.phase or PHASES
    if not given.repeats:
        for name in names:
            yield {"phase": name, **_peaks(given, name)}
        return
    peer = _peer(given.peer)(setting) if given.peer else None
    works = ours(setting, names)
    if peer is not None:
        works |= {f"{PEER}{name}": work for name, work in peer.works(names).items()}
    found = clock.ratios(
        unit(setting), works, given.repeats, warm_up=setting.num_tokens <= WARM_UP_TOKENS,
        told=lambda name, ratio: print(f"{name}: {ratio:.3f}", file=sys.stderr, flush=True),
    )  # fmt: skip
    for name in names:
        line: dict[str, Any] = {"phase": name, **_told(found[name], "fb")}
        if given.waiting != WAITING and name in WAITS:
            line["waiting_gib"] = given.waiting
        if theirs := found.get(PEER + name):
            pairs = zip(found[name].repeats, theirs.repeats, strict=True)
            line |= _told(theirs, "peer_fb")
            line |= _told(clock.Ratio(tuple(mine / other for mine, other in pairs)), "over_peer")
        if given.memory:
            line |= _peaks(given, name)
        if name == "stream 1024 shared":
            # Made-up eigenbases cost what true ones do, but say nothing of what queries share.
            line["lost"] = shared_lost(replace(setting, made_up=False))
        yield line
    if peer is not None and not given.made_up:
        yield {"agreement": peer.agreement(setting)}
        if given.peer == "kronfluence":
            yield {"disk_mib": disk_mib(setting), "peer_disk_mib": peer.disk_mib()}


def _peer(name: str) -> Any:
    """The class that does a peer's work; an extra that need not be there."""
    return getattr(import_module(f"benchmarks.{name}_peer"), name.capitalize())


def _told(ratio: clock.Ratio, name: str) -> dict[str, float]:
    low, high = ratio.spread
    return {name: ratio.median, f"{name}_low": low, f"{name}_high": high}


def _peak(setting: Setting, name: str) -> dict[str, float | None]:
    """Of this process, above what it is given: the model, factors, prepared queries."""
    setting = replace(setting, made_up=True)
    unit(setting).call()  # what is made once at first use is there before the clock starts
    if name.startswith(PEER):
        peer, phase = name.removeprefix(PEER).split(": ")
        [work] = _peer(peer)(setting).works([phase]).values()
    else:
        [work] = ours(setting, [name]).values()
    return {"peak_mib": clock.peak_mib(work.call)}


def _peaks(given: argparse.Namespace, name: str) -> dict[str, float | None]:
    """Of a phase, and of the peer's where it has one."""
    found = {"peak_mib": _memory(given, name)}
    if given.peer and name in PEERS[given.peer]:
        found["peer_peak_mib"] = _memory(given, f"{PEER}{given.peer}: {name}")
    return found


def _memory(given: argparse.Namespace, name: str) -> float | None:
    """The middle one of several peaks of a phase, each of a process of its own: what the allocator
    leaves unused between what it gives out differs by a tenth."""
    command = [
        sys.executable, "-m", "benchmarks.engine", "--memory-of", name, "--model", given.model,
        "--length", str(given.length), "--sequences", str(given.sequences),
        "--threads", str(given.threads), "--queries", str(given.queries),
        "--batch", str(given.batch), "--waiting", str(given.waiting),
        *(["--without-onednn"] if given.without_onednn else []), "--layers", *given.layers,
    ]  # fmt: skip
    peaks = []
    for _ in range(PROCESSES):
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks.append(json.loads(told.splitlines()[-1])["peak_mib"])
    return None if None in peaks else statistics.median(peaks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--model", default="M", help="S, M or L (benchmarks/models.py)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--layers", nargs="+", default=["mlp"], help="roles or globs")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a pass")
    parser.add_argument(
        "--waiting", type=int, default=WAITING, help="GiB of gradients that wait for many queries"
    )
    parser.add_argument("--repeats", type=int, default=5, help="0: no times, with --memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--phase", action="append", choices=PHASES, help="only these; repeat it")
    parser.add_argument("--peer", choices=PEERS, help="the same work by a peer")
    parser.add_argument(
        "--made-up", action="store_true",
        help="eigenbases drawn at random, which cost a pass the same; no agreement, no sizes",
    )  # fmt: skip
    parser.add_argument(
        "--without-onednn", action="store_true",
        help="products as on processors where it is not preferred (influence/products.py)",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="write docs/engine and docs/results.md")
    parser.add_argument("--scale", action="store_true", help="sweeps of one axis at a time")
    parser.add_argument("--memory", action="store_true", help="peak memory too, a process each")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
