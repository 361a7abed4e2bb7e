"""`python -m flows COMMAND`: what is not the work itself."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flows import closure, environment, gc, services
from tasks import dvcstage
from tasks.active import activate, check_active, check_inputs, deactivate, load_active
from tasks.params import ACTIVE, load_params, params_file
from tasks.progress import say
from tasks.terminal import top_lines
from tasks.workspace import STAGES, find_root

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
        ("activate", run_activate, f"let dvc.yaml have the stages of a run: write {ACTIVE}"),
        ("deactivate", run_deactivate, f"take a run out of {ACTIVE}; its artefacts stay"),
        ("check", run_check, "check a run's params and inputs; say what would run"),
        ("top", run_top, "print the top sequences of a run"),
    ):
        command(name, call, told).add_argument("run", help="name of a run: params/RUN.yaml")
    show = commands.choices["top"]
    show.add_argument("query", nargs="?", help="only queries whose name contains this")
    show.add_argument("--limit", type=int, default=5, help="sequences of each sign")
    deps = command("deps", run_deps, "compare the deps and params in dvc.yaml with the code")
    deps.add_argument("--write", action="store_true", help="rewrite them")
    gc.add_options(command("gc", gc.run_gc, "remove what no stage will use again"))
    command("up", run_up, "start server, worker, MLflow and report pages, and deploy the flows")
    command("down", run_down, "end them")
    command("deploy", run_deploy, "register the deployments with the Prefect server")
    serve = command("serve", run_serve, "one of these services, in the foreground")
    serve.add_argument("service", choices=SERVICE_NAMES)
    return top


def run_activate(root: Path, given: argparse.Namespace) -> int:
    """Write the run's entry."""
    changed = activate(root, given.run)
    say(f"{ACTIVE}: {given.run} {'written' if changed else 'was there already'}")
    fit = load_active(root).runs[given.run].fit
    if fit != given.run:
        say(f"{given.run} uses the fit of {fit}: train, tokenize, factors, eigen and correct")
    say(f"now: python -m flows.pipeline {given.run}   or   dvc repro report@{given.run}")
    return 0


def run_deactivate(root: Path, given: argparse.Namespace) -> int:
    """Remove the run's entry."""
    changed = deactivate(root, given.run)
    say(f"{ACTIVE}: {given.run} {'taken out' if changed else 'was not there'}")
    return 0


def run_check(root: Path, given: argparse.Namespace) -> int:
    """Check the input and tell the state of each stage."""
    params = load_params(root, given.run)
    check_active(root, given.run, params)
    check_inputs(root, given.run, params)
    say(f"{params_file(given.run)}: in order")
    running: set[str] = set()
    for stage in STAGES:
        reasons = dvcstage.pending(root, stage, given.run)
        behind = running.intersection(dvcstage.upstream(root, stage, given.run))
        if reasons:
            say(f"{stage:<9} would run: {reasons[0]}{', …' if len(reasons) > 1 else ''}")
        elif behind:
            say(f"{stage:<9} runs if {', '.join(s for s in STAGES if s in behind)} changed")
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
        say("dvc.yaml: written")
    elif not stale:
        say("dvc.yaml: deps and params are what the code needs")
    return 1 if stale and not given.write else 0


def run_top(root: Path, given: argparse.Namespace) -> int:
    """Print the top sequences."""
    for line in top_lines(root, given.run, given.query, given.limit):
        say(line)
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
