"""The run forms of Prefect's UI: what a person may choose, with titles, help and bounds.

Nothing here has a value of its own: a field that is left empty means what the params file says, so
a form cannot go stale. What is filled in is written to that file, comments kept.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Stage = Literal[
    "train",
    "tokenize",
    "filter",
    "factors",
    "eigen",
    "correct",
    "query",
    "stream",
    "score",
    "validate",
    "report",
]

# A field of `Changes` → the key of the params file that it sets.
KEYS = {
    "rank": "query.rank",
    "candidates": "filter.top",
    "top": "score.top",
    "shown": "report.top",
    "layers": "layers",
    "queries": "query.path",
    "split_half": "validate.split_half",
    "sample": "validate.sample",
}


class Form(BaseModel):
    """Closed: a misspelt field is an error."""

    model_config = ConfigDict(extra="forbid")


class Adjustments(Form):
    """Empty fields mean what the params file says; what you fill in is written to that file."""

    damping_ratio: float | None = Field(
        default=None,
        title="Damping: ratio",
        description="λ of a layer = ratio × the mean of its corrected eigenvalues; 0.1 in the "
        "paper. Refits nothing",
        gt=0,
        le=1e6,
    )
    damping_value: float | None = Field(
        default=None,
        title="Damping: value",
        description="or one λ for every layer; not both",
        gt=0,
        le=1e12,
    )
    rank: int | None = Field(
        default=None,
        title="Rank",
        description="of the prepared query gradients while all candidates stream by",
        ge=1,
        le=65536,
    )
    full_rank: bool = Field(default=False, title="Full rank", description="no truncation at all")
    candidates: int | None = Field(
        default=None,
        title="Candidates",
        description="sequences a query that the filter lets through",
        ge=1,
    )
    score_all: bool = Field(
        default=False, title="Score every sequence", description="no filter at all: slow, and exact"
    )
    top: int | None = Field(
        default=None,
        title="Top sequences",
        description="a query and sign, scored again at full rank and told token by token",
        ge=1,
        le=10_000,
    )
    shown: int | None = Field(
        default=None,
        title="Shown in the report",
        description="a query and sign; at most the top sequences",
        ge=1,
        le=10_000,
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> "Adjustments":
        for one, other in (
            ("damping_ratio", "damping_value"),
            ("rank", "full_rank"),
            ("candidates", "score_all"),
        ):
            if getattr(self, one) is not None and getattr(self, other):
                raise ValueError(f"{one} and {other} are both given; take one of them")
        return self

    def settings(self) -> dict[str, Any]:
        """Values by key of the params file."""
        told = _settings(self)
        if self.damping_ratio is not None:
            told["query.damping"] = {"ratio": self.damping_ratio}
        if self.damping_value is not None:
            told["query.damping"] = {"value": self.damping_value}
        if self.full_rank:
            told["query.rank"] = None
        if self.score_all:
            told["filter"] = {"method": "none"}
        return told


class Changes(Adjustments):
    """Empty fields mean what the params file says; what you fill in is written to that file."""

    layers: list[str] | None = Field(
        default=None,
        title="Layers",
        description="mlp, attention, all, or globs over module names; another choice, another fit",
        min_length=1,
    )
    queries: str | None = Field(
        default=None,
        title="Queries",
        description="path of a .jsonl file of queries, from the project's root",
        min_length=1,
    )


class Measurements(Form):
    """Empty fields mean what the params file says; what you fill in is written to that file."""

    split_half: int | None = Field(
        default=None,
        title="Sequences in a half",
        description="that the factors of each half of the corpus are fitted on, to compare them",
        ge=2,
    )
    sample: int | None = Field(
        default=None,
        title="Sequences compared",
        description="whose scores by the two halves are correlated",
        ge=0,
    )

    def settings(self) -> dict[str, Any]:
        """Values by key of the params file."""
        return _settings(self)


class TypedQuery(Form):
    """One question: what made the model say this completion after this prompt?"""

    name: str = Field(title="Name", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    prompt: str = Field(title="Prompt", min_length=1)
    completion: str | None = Field(
        default=None,
        title="Completion",
        description="joined to the prompt as it stands: a leading space belongs to it",
        min_length=1,
    )
    generate: int | None = Field(
        default=None,
        title="Generate",
        description="or so many tokens of the model's own greedy completion",
        ge=1,
        le=4096,
    )
    contrast: str | None = Field(
        default=None,
        title="Contrast",
        description="another completion: then log p of the first less log p of this is measured",
        min_length=1,
    )

    @model_validator(mode="after")
    def _completed_in_one_way(self) -> "TypedQuery":
        if (self.completion is None) == (self.generate is None):
            raise ValueError("give a completion, or a number of tokens to generate: one of the two")
        return self


def _settings(form: BaseModel) -> dict[str, Any]:
    given = form.model_dump()
    return {key: given[name] for name, key in KEYS.items() if given.get(name) is not None}
