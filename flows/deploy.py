"""The deployments: what a person can start from Prefect's UI."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from pydantic.fields import FieldInfo

from flows import doors
from flows.limits import make_limit
from tasks.active import load_active
from tasks.params import run_names
from tasks.validation.settings import load_benchmark

POOL = "local"
TAGS = ["influence"]


@dataclass(frozen=True, slots=True)
class Door:
    """A deployment: a flow with what it says beyond the flow's own form.

    Attributes:
        flow: what it starts.
        name: of the deployment.
        description: Markdown.
        tags: beside those that all have.
        runs: the names that its form offers.
        preset: what its form is filled in with.
    """

    flow: Flow[Any, Any]
    name: str
    description: str
    tags: tuple[str, ...]
    runs: list[str]
    preset: dict[str, Any] = field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        """The flow as an importable name: the code is read from disk at every run."""
        return f"{doors.__name__}.{self.flow.fn.__name__}"


RUN_DOORS = (
    (doors.pipeline, ("fit", "score", "report")),
    (doors.validate, ("validation", "mlflow")),
    (doors.queries, ("score", "report", "no-refit")),
)


def doors_of(root: Path) -> list[Door]:
    """Those of runs, and one for each active benchmark: `validate-concrete`."""
    runs = run_names(root)
    of_runs = [
        Door(flow, flow.name, flow.description or "", tags, runs) for flow, tags in RUN_DOORS
    ]
    return of_runs + [
        Door(
            doors.benchmark,
            f"validate-{name}",
            f"**{load_benchmark(root, name).title}.** {doors.benchmark.description}",
            ("benchmark", "validation", "mlflow"),
            [name],
            {"run": name},
        )
        for name in load_active(root).benchmarks
    ]


def deploy(root: Path) -> list[str]:
    """Register the work pool, the `gpu` limit and all deployments; their names.

    Again after a new run was made: the forms offer the runs that have a params file. Deployments
    of benchmarks that are no longer active go.
    """
    found = doors_of(root)
    with get_client(sync_client=True) as client:
        _make_pool(client)
        make_limit(client)
        _remove_others(client, {door.name for door in found})
        return [_register(client, root, door) for door in found]


def refresh(root: Path) -> None:
    """Let the forms offer the present runs, where there are deployments."""
    with get_client(sync_client=True) as client:
        for door in doors_of(root):
            try:
                client.read_deployment_by_name(f"{door.flow.name}/{door.name}")
            except ObjectNotFound:
                continue
            _register(client, root, door)


def _register(client: SyncPrefectClient, root: Path, door: Door) -> str:
    client.create_deployment(
        flow_id=client.create_flow(door.flow),
        name=door.name,
        entrypoint=door.entrypoint,
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(root)}}],
        work_pool_name=POOL,
        job_variables={"working_dir": str(root), "env": {"PYTHONPATH": str(root)}},
        concurrency_limit=1,
        parameters=door.preset,
        parameter_openapi_schema=form_schema(door.flow, door.runs),
        enforce_parameter_schema=True,
        description=door.description,
        tags=[*TAGS, *door.tags],
    )
    return f"{door.flow.name}/{door.name}"


def _remove_others(client: SyncPrefectClient, names: set[str]) -> None:
    """Remove the deployments of benchmarks that are not among `names`."""
    flows = FlowFilter(name=FlowFilterName(any_=[doors.benchmark.name]))
    for each in client.read_deployments(flow_filter=flows):
        if each.name not in names:
            client.delete_deployment(each.id)


def form_schema(flow: Flow[Any, Any], runs: list[str]) -> dict[str, Any]:
    """The form of a flow: titles and help as its annotations have them, a choice of the runs."""
    schema = parameter_schema(flow).model_dump_for_openapi()
    for name, hint in get_type_hints(flow.fn, include_extras=True).items():
        for told in getattr(hint, "__metadata__", ()):
            if isinstance(told, FieldInfo):  # Prefect takes the name for the title
                schema["properties"][name]["title"] = told.title
                if told.description:
                    schema["properties"][name]["description"] = told.description
    schema["properties"]["run"]["enum"] = runs
    for fields in (schema, *schema.get("definitions", {}).values()):
        fields["properties"] = {
            name: _left_empty(each) for name, each in fields["properties"].items()
        }
    return schema


def _left_empty(field: dict[str, Any]) -> dict[str, Any]:
    """A field that may be None as one that may be left empty, instead of a switch of types."""
    if "$ref" in field:
        return {key: value for key, value in field.items() if key != "default"}
    kinds = [kind for kind in field.get("anyOf", ()) if kind.get("type") != "null"]
    if field.get("default", ...) is not None or len(kinds) != 1:
        return field
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return {**rest, **kinds[0]}


def _make_pool(client: SyncPrefectClient) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
