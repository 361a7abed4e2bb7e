"""The deployments: what a person can start from Prefect's UI."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from pydantic.fields import FieldInfo

from flows import doors
from flows.limits import make_limit
from tasks.params import run_names

POOL = "local"
TAGS = ["influence"]


@dataclass(frozen=True, slots=True)
class Door:
    """A flow with what its deployment says beyond the flow's own docstring and form."""

    flow: Flow[Any, Any]
    tags: tuple[str, ...]

    @property
    def entrypoint(self) -> str:
        """The flow as an importable name: the code is read from disk at every run."""
        return f"{doors.__name__}.{self.flow.fn.__name__}"


DOORS = (
    Door(doors.pipeline, ("fit", "score", "report")),
    Door(doors.validate, ("validation", "mlflow")),
    Door(doors.queries, ("score", "report", "no-refit")),
)


def deploy(root: Path) -> list[str]:
    """Register the work pool, the `gpu` limit and all deployments; their names.

    Again after a new run was made: the forms offer the runs that have a params file.
    """
    with get_client(sync_client=True) as client:
        _make_pool(client)
        make_limit(client)
        return [_register(client, root, door) for door in DOORS]


def refresh(root: Path) -> None:
    """Let the forms offer the present runs, where there are deployments."""
    with get_client(sync_client=True) as client:
        for door in DOORS:
            try:
                client.read_deployment_by_name(f"{door.flow.name}/{door.flow.name}")
            except ObjectNotFound:
                continue
            _register(client, root, door)


def _register(client: SyncPrefectClient, root: Path, door: Door) -> str:
    client.create_deployment(
        flow_id=client.create_flow(door.flow),
        name=door.flow.name,
        entrypoint=door.entrypoint,
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(root)}}],
        work_pool_name=POOL,
        job_variables={"working_dir": str(root), "env": {"PYTHONPATH": str(root)}},
        concurrency_limit=1,
        parameter_openapi_schema=form_schema(door.flow, run_names(root)),
        enforce_parameter_schema=True,
        description=door.flow.description,
        tags=[*TAGS, *door.tags],
    )
    return f"{door.flow.name}/{door.flow.name}"


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
