"""What MLflow knows by reference: the corpus as a data set, the factors as versions of a model.

DVC keeps the bytes; a version says which, by path and md5.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALIAS = "current"  # `latest` is a word of MLflow's own


@dataclass(frozen=True, slots=True)
class Dataset:
    """The corpus that was scored: its path, DVC's md5 of it, and how much it holds."""

    path: str
    md5: str
    role: str
    profile: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Factors:
    """A fitted curvature: the folder that DVC keeps, its md5, and what it was fitted on."""

    name: str
    path: str
    md5: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The reference that stands for the bytes."""
        return f"dvc://{self.path}?md5={self.md5}"


def input_of(dataset: Dataset) -> Any:
    """The entity that MLflow's Dataset column shows."""
    from mlflow import entities

    return entities.DatasetInput(
        entities.Dataset(
            name=dataset.path,
            digest=dataset.md5,
            source_type="local",
            source=json.dumps({"uri": dataset.path}),
            profile=json.dumps(dataset.profile),
        ),
        [entities.InputTag("mlflow.data.context", dataset.role)],
    )


def register(client: Any, run_id: str, factors: Factors) -> str:
    """Give the alias to the version of these factors, new if their md5 is; its `models:` URI.

    Nothing is copied. The version names the first run that measured the factors.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(factors.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{factors.name}'")
    version = next((each.version for each in known if each.source == factors.source), None)
    if version is None:
        created = client.create_model_version(
            factors.name,
            factors.source,
            run_id,
            tags=dict(factors.tags),
            description=f"DVC has the bytes: `dvc checkout {factors.path}` where dvc.lock names it",
        )
        version = created.version
    client.set_registered_model_alias(factors.name, ALIAS, version)
    return f"models:/{factors.name}/{version}"
