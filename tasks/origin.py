"""The section `train` of a params file: where the model comes from."""

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from tasks.section import Count, Section, Seed, Text, by_key


class LocalCheckpoint(Section):
    """A Hugging Face checkpoint in a folder."""

    path: Text = Field(description="folder with config.json, model.safetensors, tokenizer.json")


class HubCheckpoint(Section):
    """A Hugging Face checkpoint from the hub, at one revision."""

    hub: Text = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="organisation/name")
    revision: Text = Field(
        pattern=r"^[0-9a-f]{40}$", description="the full sha of a commit: names like main move"
    )


class Checkpoint(Section):
    """A model that exists."""

    checkpoint: Annotated[
        Annotated[LocalCheckpoint, Tag("<path>")] | Annotated[HubCheckpoint, Tag("<hub>")],
        by_key(path="<path>", hub="<hub>"),
    ]


class Architecture(Section):
    """A small model and how to train it from scratch on the run's corpus."""

    architecture: Literal["gpt2", "llama"]
    width: Count = Field(description="width of the residual stream; a multiple of heads")
    layers: Count
    heads: Count
    vocabulary: int = Field(ge=260, description="size of the byte-level BPE vocabulary")
    context: int = Field(ge=2, description="tokens")
    steps: Count
    batch: Count = Field(description="sequences a step")
    learning_rate: float = Field(gt=0, le=1)
    seed: Seed

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Architecture":
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width {self.width} does not split into {self.heads} heads of an even size; "
                f"take a width that is a multiple of {2 * self.heads}"
            )
        return self


class Scratch(Section):
    """A model to train."""

    scratch: Architecture
