"""Tables of docs/results.md and README.md, rendered from docs/results/*.json and from nothing else.

Both files are written by hand but for what stands between two markers. The reports of runs show a
few of the same numbers; they find them in a file of their own, since a report that depended on the
outcomes would make DVC run the benchmarks first.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import store
from tasks.validation import labels
from tasks.validation.context import RESULTS
from tasks.validation.thresholds import Threshold, judge

PAGE, README = Path("docs/results.md"), Path("README.md")
CARD = Path("tasks/page/templates/ground_truth.json")
OPEN, CLOSE = "<!-- benchmarks -->", "<!-- /benchmarks -->"
NOTHING = "No benchmark has been run yet: `python -m flows.stage validate concrete` runs the first."
COLUMNS = ("ekfac", "gradient_dot", "lissa", "astra", "exact")  # of the README
NONE = "–"
SPLITS = ("train", "validation", "test")
SWEEPS = {  # of which a line each, and what is compared there
    "lissa": "LiSSA by depth, with the PBRF",
    "astra": "ASTRA by iterations, with exact Gauss–Newton",
    "dampings": "damping ÷ mean eigenvalue, with exact Gauss–Newton of the same damping",
    "ranks": "rank, with full rank",
    "splits": "blocks of A and S (share of the memory), with one block",
    "fit_sizes": "examples of the fit, with all",
}


def read(root: Path) -> list[dict[str, Any]]:
    """Every committed outcome, in the order of the tables."""
    outcomes = {file.stem: store.read_json(file) for file in (root / RESULTS).glob("*.json")}
    return [outcomes[name] for name in labels.in_order(outcomes)]


def write(root: Path) -> list[Path]:
    """Bring both files up to date; those that changed. A file that is not there is not made.

    Raises:
        ValueError: if a file lacks the markers.
    """
    changed = []
    for path, text in _wanted(root).items():
        if path.read_text(encoding="utf-8") != text:
            store.write_text(path, text)
            changed.append(path)
    return changed


def check(root: Path) -> list[str]:
    """What differs from the committed outcomes, a sentence each; nothing if all agree."""
    remedy = "`python -m flows results` writes it"
    try:
        wanted = _wanted(root)
    except ValueError as error:
        return [str(error)]
    return [
        f"{path.relative_to(root)} is not what {RESULTS} says; {remedy}"
        for path, text in wanted.items()
        if path.read_text(encoding="utf-8") != text
    ]


def _wanted(root: Path) -> dict[Path, str]:
    outcomes, pages = read(root), {root / PAGE: render, root / README: readme_block}
    wanted = {
        path: _with_block(path, block(outcomes)) for path, block in pages.items() if path.exists()
    }
    if (root / PAGE).exists() and (root / CARD).exists():
        wanted[root / CARD] = card(outcomes)
    return wanted


def _with_block(path: Path, block: str) -> str:
    text = path.read_text(encoding="utf-8")
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or text.index(OPEN) > text.index(CLOSE):
        raise ValueError(f"{path} must hold {OPEN} and, after it, {CLOSE}, once each; add them")
    before, rest = text.split(OPEN)
    after = rest.split(CLOSE)[1]
    return f"{before}{OPEN}\n{block}\n{CLOSE}{after}"


def readme_block(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Pearson with the PBRF by benchmark and method; `quick`, which proves nothing, is left out."""
    shown = [each for each in outcomes if each["benchmark"] != "quick"]
    if not shown:
        return NOTHING
    rows = []
    for outcome in shown:
        link = f"[{outcome['benchmark']}](docs/results.md#{outcome['benchmark']})"
        methods = outcome["methods"]
        cells = [_agreement(methods[name]) if name in methods else NONE for name in COLUMNS]
        rows.append([link, *cells, str(_num_queries(outcome))])
    head = ["Pearson with the PBRF", *map(labels.method, COLUMNS), "queries"]
    told = "95 % bootstrap intervals over the queries of all seeds."
    return _table(head, rows) + f"\n\n{told} Everything else: [docs/results.md](docs/results.md)."


def card(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Agreement of EK-FAC and of gradient dot product with the PBRF, for the reports of runs."""
    rows = [
        {"benchmark": each["benchmark"]}
        | {name: each["methods"][name]["truth"] for name in ("ekfac", "gradient_dot")}
        for each in outcomes
        if each["benchmark"] != "quick" and each["methods"]["ekfac"]["truth"] is not None
    ]
    return json.dumps(rows, indent=1) + "\n"


def render(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The thresholds, then each benchmark."""
    if not outcomes:
        return NOTHING
    parts = ["### What was asked for, and what came out", "", _thresholds(judge(outcomes))]
    for outcome in outcomes:
        parts += ["", *_benchmark(outcome)]
    return "\n".join(parts)


def _thresholds(rows: Sequence[Threshold]) -> str:
    told = (
        "The numbers on the left were fixed before any benchmark ran. *Open*: a benchmark that "
        "decides it has not run. Bold: what missed it.\n\n"
    )
    cells = []
    for row in rows:
        found = [
            f"{each.benchmark} {each.told}" if each.met else f"**{each.benchmark} {each.told}**"
            for each in row.found
        ]
        found += [f"{name} not run" for name in row.missing]
        verdict = f"**{row.verdict}**" if row.verdict == "missed" else row.verdict
        cells.append([row.asked, " · ".join(found) or NONE, verdict])
    return told + _table(["asked for", "came out", ""], cells)


def _benchmark(outcome: Mapping[str, Any]) -> list[str]:
    seeds = outcome["seeds"]
    damping = ", ".join(f"{rule} {value:g}" for rule, value in outcome["damping"].items())
    machine = ", ".join(f"{key} {value}" for key, value in outcome["machine"].items())
    facts = [
        f"N = {outcome['num_examples']:,} training examples, {outcome['num_truth']} of them "
        f"against {outcome['num_queries']} queries for each of {_count(len(seeds), 'seed')}",
        f"{outcome['num_attributed']:,} of {outcome['num_parameters']:,} parameters attributed",
        f"{outcome['dtype']}, damping {damping}",
        f"{_seconds(outcome['seconds'])} in all" + (f" ({machine})" if machine else ""),
    ]
    parts = [f"### {outcome['benchmark']}", "", f"{_cell(outcome['title'])}. {'; '.join(facts)}."]
    for table in (_methods(outcome), _truth(outcome), _sweeps(outcome), _retrained(outcome)):
        parts += ["", table] if table else []
    lines = [*_mislabelled(outcome), *_fine_tuned(outcome), *_trained(outcome)]
    return parts + (["", *(f"- {line}" for line in lines)] if lines else [])


def _methods(outcome: Mapping[str, Any]) -> str:
    seeds = _count(len(outcome["seeds"]), "seed")
    head = ["method", f"Pearson with the PBRF [95 %] ({_num_queries(outcome)} queries, {seeds})",
            "each seed", "Spearman", "with exact", "above gradient dot [paired 95 %]",
            "fit, s", "a query, s"]  # fmt: skip
    rows = []
    for name, each in outcome["methods"].items():
        if each["truth"] is None:
            rows.append([labels.method(name), _agreement(each), *[NONE] * 6])
            continue
        by_seed = [NONE if one is None else _number(one) for one in each["by_seed"]]
        above = each["above_dot"]
        gain = NONE if above is None else f"{above[0]:+.3f} [{above[1]:+.3f}, {above[2]:+.3f}]"
        times = [_short(each["fit_seconds"]), _short(each["query_seconds"])]
        exact = _interval(each["exact"]) if each["exact"] else NONE
        spearman = _number(each["truth"]["spearman"])
        agreed = [_agreement(each), ", ".join(by_seed), spearman, exact, gain]
        rows.append([labels.method(name), *agreed, *times])
    return _table(head, rows)


def _truth(outcome: Mapping[str, Any]) -> str:
    head = ["PBRF at ε", "exact with it [95 %]", "response per copy differs", "converged",
            "worst residual", "gradients a solve", "time a seed"]  # fmt: skip
    rows = [
        [f"{each['epsilon']:g}/N", _interval(each["exact"]), labels.percent(each["linearity"], 2),
         labels.percent(each["converged"], 1), f"{each['worst_residual']:.1e}",
         f"{each['evaluations']:.0f}", _seconds(each["seconds"])]
        for each in outcome["truth"]
    ]  # fmt: skip
    return _table(head, rows) if rows else ""


def _sweeps(outcome: Mapping[str, Any]) -> str:
    rows = []
    for name, told in SWEEPS.items():
        for method in dict.fromkeys(point["method"] for point in outcome[name]):
            points = [point for point in outcome[name] if point["method"] == method]
            rows.append([told, labels.method(method), " · ".join(map(_point, points))])
    return _table(["sweep", "method", "Pearson"], rows) if rows else ""


def _point(point: Mapping[str, Any]) -> str:
    agreement = point["reference"] if point["method"] != "lissa" else None
    agreement = agreement or point["truth"]
    note = f" ({_cell(point['note'])})" if point["note"] else ""
    return f"{point['x']:g}: {_number(agreement['pearson']) if agreement else 'failed'}{note}"


def _retrained(outcome: Mapping[str, Any]) -> str:
    found = outcome["retrained"]
    if not found:
        return ""
    rows = [[labels.method(name), _interval(each)] for name, each in found["scores"].items()]
    rows.append(["*ceiling* (two halves of the trainings)", _interval(found["ceiling"])])
    told = f"{found['num_subsets']} subsets × {found['num_seeds']} trainings"
    head = ["method", f"linear datamodeling score [95 %] ({told}, {_seconds(found['seconds'])})"]
    return _table(head, rows)


def _mislabelled(outcome: Mapping[str, Any]) -> list[str]:
    found = outcome["mislabelled"]
    if not found:
        return []
    methods = [
        f"{labels.method(name)} "
        + ", ".join(
            f"{labels.percent(part)} in the top {labels.percent(float(share))}"
            for share, part in shares.items()
        )
        for name, shares in found["found"].items()
    ]
    return [
        f"{found['num_mislabelled']} mislabelled, found by self-influence: {'; '.join(methods)}."
    ]


def _fine_tuned(outcome: Mapping[str, Any]) -> list[str]:
    rows = (outcome["fine_tuned"] or {}).items()
    told = "; ".join(f"{labels.method(name)} {_interval(each)}" for name, each in rows)
    return [f"Fine-tuning on one sequence, Pearson with the change of f: {told}."] if rows else []


def _trained(outcome: Mapping[str, Any]) -> list[str]:
    models = []
    for each in outcome["trained"]:
        losses = " / ".join(f"{each[f'{split}_loss']:.3g}" for split in SPLITS)
        models.append(
            f"seed {each['seed']}: rate {each['learning_rate']:g}, L2 {each['weight_decay']:g}, "
            f"loss {losses}"
        )
    return [f"Models (loss on {' / '.join(SPLITS)}): {'; '.join(models)}."] if models else []


def _agreement(method: Mapping[str, Any]) -> str:
    if method["truth"] is None:
        return f"**failed**: {_cell(method['failed'] or 'no reason was given')}"
    return _interval(method["truth"])


def _interval(found: Mapping[str, Any]) -> str:
    pearson, low, high = (_number(found[key]) for key in ("pearson", "low", "high"))
    return f"{pearson} [{low}, {high}]"


def _number(value: float) -> str:
    """Three decimals, and more near 1."""
    if value >= 0.99999:
        return "1.000"
    return f"{value:.5f}" if value >= 0.9995 else f"{value:.3f}"


def _num_queries(outcome: Mapping[str, Any]) -> str:
    counts = {m["truth"]["num_queries"] for m in outcome["methods"].values() if m["truth"]}
    return "–".join(map(str, sorted(counts))) or "0"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _short(seconds: float) -> str:
    return "0" if seconds == 0 else f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{_short(seconds)} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
