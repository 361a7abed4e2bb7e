"""`python -m flows COMMAND`: what is not the work itself."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flows import closure, environment, gc, planning, services
from flows.checks import check, file_of, stages_of
from tasks import dvcstage
from tasks.active import VALIDATION, activate, deactivate, load_active
from tasks.interchange import UNITS, tda_lines
from tasks.params import ACTIVE
from tasks.progress import say
from tasks.store import write_text
from tasks.terminal import top_lines
from tasks.validation import results
from tasks.validation.activation import activate_benchmark, deactivate_benchmark
from tasks.validation.settings import is_benchmark
from tasks.workspace import find_root

SERVICE_NAMES = ("server", "worker", "mlflow", "reports")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = parser().parse_args(arguments)
    try:
        root = find_root(Path.cwd())
        environment.set_environment(root)
        return given.command(root, given)
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        sys.stderr.write(f"flows: error: {error}\n")
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m flows", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: object, told: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=told, description=told)
        sub.set_defaults(command=call)
        return sub

    for name, call, told in (
        (
            "activate",
            run_activate,
            f"let DVC have the stages of a run or benchmark: write {ACTIVE}",
        ),
        ("deactivate", run_deactivate, f"take one out of {ACTIVE}; its artefacts stay"),
        ("check", run_check, "check params and inputs of a run or benchmark; say what would run"),
        ("top", run_top, "print the top sequences of a run"),
    ):
        what = "params/NAME.yaml" if name == "top" else "params/[benchmarks/]NAME.yaml"
        command(name, call, told).add_argument("run", metavar="NAME", help=what)
    show = commands.choices["top"]
    show.add_argument("query", nargs="?", help="only queries whose name contains this")
    show.add_argument("--limit", type=int, default=5, help="sequences of each sign")
    show.add_argument("--duplicates", action="store_true", help="show near duplicates as well")
    planning.add_options(command("plan", planning.run_plan, "print what a run will cost"))
    deps = command("deps", run_deps, "compare deps and params in each dvc.yaml with the code")
    deps.add_argument("--write", action="store_true", help="rewrite them")
    gc.add_options(command("gc", gc.run_gc, "remove what no stage will use again"))
    export = command("export", run_export, "write a run's top sequences for another program")
    export.add_argument("run", metavar="NAME", help="params/NAME.yaml")
    export.add_argument("--format", choices=("tda",), default="tda", help="docs/interchange.md")
    export.add_argument("--unit", choices=UNITS, default="nats", help="of the scores")
    export.add_argument("--output", type=Path, help="a file; else it is printed")
    command("results", run_results, "write docs/results.md and README.md from docs/results/*.json")
    command("up", run_up, "start server, worker, MLflow and report pages, and deploy the flows")
    command("down", run_down, "end them")
    command("deploy", run_deploy, "register the deployments with the Prefect server")
    serve = command("serve", run_serve, "one of these services, in the foreground")
    serve.add_argument("service", choices=SERVICE_NAMES)
    return top


def run_results(root: Path, given: argparse.Namespace) -> int:
    """Write the tables of all benchmarks that have been run."""
    for path in results.write(root):
        say(f"{path.relative_to(root)}: written")
    return 0


def run_activate(root: Path, given: argparse.Namespace) -> int:
    """Write the entry of a run or benchmark."""
    benchmark = is_benchmark(root, given.run)
    changed = (activate_benchmark if benchmark else activate)(root, given.run)
    say(f"{ACTIVE}: {given.run} {'written' if changed else 'was there already'}")
    if benchmark:
        target = f"{VALIDATION}:validate@{given.run}"
        say(f"now: python -m flows.pipeline {given.run}   or   dvc repro {target}")
        say("to start it from Prefect's UI: make deploy, where make up is up already")
        return 0
    fit = load_active(root).runs[given.run].fit
    if fit != given.run:
        say(f"{given.run} uses the fit of {fit}: train, tokenize, factors, eigen and correct")
    say(f"now: python -m flows.pipeline {given.run}   or   dvc repro report@{given.run}")
    return 0


def run_deactivate(root: Path, given: argparse.Namespace) -> int:
    """Remove the entry of a run or benchmark."""
    known = given.run in load_active(root).benchmarks
    changed = (deactivate_benchmark if known else deactivate)(root, given.run)
    say(f"{ACTIVE}: {given.run} {'taken out' if changed else 'was not there'}")
    return 0


def run_check(root: Path, given: argparse.Namespace) -> int:
    """Check the input and tell the state of each stage."""
    check(root, given.run)
    say(f"{file_of(root, given.run)}: in order")
    running: set[str] = set()
    stages = stages_of(root, given.run)
    for stage in stages:
        reasons = dvcstage.pending(root, stage, given.run)
        behind = running.intersection(dvcstage.upstream(root, stage, given.run))
        if reasons:
            say(f"{stage:<9} would run: {reasons[0]}{', …' if len(reasons) > 1 else ''}")
        elif behind:
            say(f"{stage:<9} runs if {', '.join(s for s in stages if s in behind)} changed")
        else:
            say(f"{stage:<9} is up to date")
        if reasons or behind:
            running.add(stage)
    return 0


def run_deps(root: Path, given: argparse.Namespace) -> int:
    """Tell where dvc.yaml is behind the code, or bring it up to date."""
    stale = closure.stale_deps(root)
    for stage, faults in stale.items():
        say(f"{stage}: {faults}")
    if given.write and stale:
        closure.write_deps(root)
        say("written")
    elif not stale:
        say("deps and params are what the code needs")
    return 1 if stale and not given.write else 0


def run_top(root: Path, given: argparse.Namespace) -> int:
    """Print the top sequences."""
    for line in top_lines(root, given.run, given.query, given.limit, given.duplicates):
        say(line)
    return 0


def run_export(root: Path, given: argparse.Namespace) -> int:
    """Write the top sequences in the form of another program."""
    lines = list(tda_lines(root, given.run, given.unit))
    if given.output is None:
        for line in lines:
            say(line)
    else:
        write_text(given.output, "".join(f"{line}\n" for line in lines))
        say(f"{given.output}: {len(lines)} queries")
    return 0


def run_up(root: Path, given: argparse.Namespace) -> int:
    """Start the services."""
    services.up(root, lambda: _deploy(root))
    return 0


def run_down(root: Path, given: argparse.Namespace) -> int:
    """End the services."""
    services.down(root)
    return 0


def run_serve(root: Path, given: argparse.Namespace) -> int:
    """Become a service."""
    services.serve(root, given.service, lambda: _deploy(root))
    return 0


def run_deploy(root: Path, given: argparse.Namespace) -> int:
    """Register the deployments."""
    environment.check_server()
    if environment.API_URL not in os.environ:
        raise ValueError("no Prefect server of this checkout is up; run `make up`, which deploys")
    say(f"deployments: {', '.join(_deploy(root))}")
    return 0


def _deploy(root: Path) -> list[str]:
    from flows.deploy import deploy  # after the environment: Prefect reads it when imported

    return deploy(root)


if __name__ == "__main__":
    sys.exit(main())
