"""What is wrong with a params file, in sentences: file, key, given, wanted, what to do."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

Loc = Sequence[int | str]
PLAINER = {  # pydantic's words about Python, in words about YAML
    "a valid tuple": "a list",
    "a valid dictionary or instance of": "the keys of",
    "a valid string": "text",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "tuple should have": "a list that has",
    " after validation": "",
}


def complaints(file: Path, model: type[BaseModel], error: ValidationError) -> str:
    """One line for each of pydantic's errors about `file`, which was read as a `model`."""
    return "\n".join(f"{file}: {_sentence(model, wrong)}" for wrong in error.errors())


def _sentence(model: type[BaseModel], wrong: Any) -> str:
    loc, kind, given = wrong["loc"], wrong["type"], _short(wrong["input"])
    key = ".".join(str(part) for part in loc if not _is_tag(part))
    field = _field(model, loc)
    meaning = f" ({field.description})" if field is not None and field.description else ""
    if kind == "extra_forbidden":
        return f"`{key}` is unknown; {_known(model, loc)}"
    if kind == "missing":
        return f"`{key}` is missing{meaning}; add it (every key is written out)"
    if kind == "kind":
        return f"`{key}`: given {given}, wanted one of {wrong['msg']}; write exactly one of them"
    if kind == "value_error":
        return f"{f'`{key}`: ' if key else ''}{wrong['ctx']['error']}"
    wanted = wrong["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    wanted = wanted[0].lower() + wanted[1:]
    for word, plain in PLAINER.items():
        wanted = wanted.replace(word, plain)
    return f"`{key}`: given {given}, wanted {wanted}{meaning}; change it"


def _known(model: type[BaseModel], loc: Loc) -> str:
    """Which keys there are where an unknown one stands, the likeliest first."""
    section = _section(model, loc[:-1])
    names = [] if section is None else [f.alias or name for name, f in section.model_fields.items()]
    near = get_close_matches(str(loc[-1]), names, n=1, cutoff=0.6)
    advice = f"did you mean `{near[0]}`?" if near else "remove it."
    return f"{advice} The keys here are {', '.join(names)}"


def _field(model: type[BaseModel], loc: Loc) -> FieldInfo | None:
    names = [part for part in loc if isinstance(part, str)]
    if not names or _is_tag(names[-1]):
        return None
    section = _section(model, loc[: list(loc).index(names[-1], len(names) - 1)])
    return None if section is None else _by_alias(section).get(names[-1])


def _section(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The class that reads what stands at `loc`; tags like `<ratio>` choose within a union."""
    found: Any = model
    for part in loc:
        if _is_tag(part):
            found = next((c for c in _members(found) if Tag(str(part)) in _annotations(c)), None)
            found = get_args(found)[0] if found is not None else None
        else:
            field = _by_alias(found).get(str(part)) if _is_model(found) else None
            found = None if field is None else field.annotation
    return found if _is_model(found) else None


def _members(union: Any) -> tuple[Any, ...]:
    inner = get_args(union)[0] if get_origin(union) is Annotated else union
    return get_args(inner)


def _annotations(annotated: Any) -> tuple[Any, ...]:
    return get_args(annotated)[1:]


def _by_alias(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _is_model(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, BaseModel)


def _is_tag(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith("<")


def _short(given: Any) -> str:
    text = "nothing" if given is None else repr(given)
    return text if len(text) <= 60 else f"{text[:57]}…"
