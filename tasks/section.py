"""What every section of a params file is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen, strict (no "32" for 32), and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def by_key(**tags: str) -> Discriminator:
    """Choose the class of a union by which of the keys `tags` is there."""

    def tag(given: Any) -> str | None:
        keys = given if isinstance(given, dict) else getattr(given, "__dict__", {})
        return next((tags[key] for key in tags if key in keys), None)

    return Discriminator(tag, custom_error_type="kind", custom_error_message=" or ".join(tags))
