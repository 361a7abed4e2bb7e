"""The whole page as one text: styles, script and pictures inside, nothing fetched."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.page.characters import visible
from tasks.page.evidence import Evidence
from tasks.page.facts import facts
from tasks.page.shading import LEVELS
from tasks.page.views import SPURIOUS, query_views, tag_counts, unit

_TEMPLATES = Path(__file__).parent / "templates"


def document(evidence: Evidence, most: int) -> str:
    """The page of a run, with up to `most` sequences for each side of each query."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    evidence = evidence.checked()
    queries = query_views(evidence, most)
    return environment.get_template("report.html.j2").render(
        facts=facts(evidence),
        queries=queries,
        tags=tag_counts(queries),
        unit=unit(evidence).unit,
        levels=LEVELS,
        spurious=SPURIOUS,
        style=_inline("report.css"),
        script=_inline("report.js"),
    )


def _inline(name: str) -> Markup:
    """A file of ours as it is; nothing from a corpus comes this way."""
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def _printable(value: Any) -> Any:
    """Last station of every `{{ … }}`, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
