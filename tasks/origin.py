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


class AdapterCheckpoint(Section):
    """A LoRA adapter in a folder, and the checkpoint that it adapts."""

    adapter: Text = Field(description="folder with adapter_config.json, adapter_model.safetensors")
    base: Text = Field(description="folder of the checkpoint that the adapter was trained on")


class Checkpoint(Section):
    """A model that exists."""

    checkpoint: Annotated[
        Annotated[LocalCheckpoint, Tag("<path>")]
        | Annotated[HubCheckpoint, Tag("<hub>")]
        | Annotated[AdapterCheckpoint, Tag("<adapter>")],
        by_key(path="<path>", hub="<hub>", adapter="<adapter>"),
    ]


class Training(Section):
    """How long and how fast to train on the run's corpus."""

    steps: Count
    batch: Count = Field(description="sequences a step")
    learning_rate: float = Field(gt=0, le=1)
    seed: Seed


class Architecture(Training):
    """A small model to train from scratch on the run's corpus."""

    architecture: Literal["gpt2", "llama"]
    width: Count = Field(description="width of the residual stream; a multiple of heads")
    layers: Count
    heads: Count
    vocabulary: int = Field(ge=260, description="size of the byte-level BPE vocabulary")
    context: int = Field(ge=2, description="tokens")

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


class Tuning(Training):
    """A checkpoint and how to train it on: influence is then that of the run's corpus alone."""

    path: Text = Field(description="folder with config.json, model.safetensors, tokenizer.json")
    chat_template: Text | None = Field(
        description="a Jinja template for `messages`; null: that of the checkpoint's tokenizer"
    )


class FineTuned(Section):
    """A model that exists, trained on."""

    finetune: Tuning
