"""report.html: the report as one page that needs no network, for a browser, a phone or a printer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlhf.evaluation import plots
from rlhf.evaluation.compare import Scored, main_system
from rlhf.evaluation.origins import lineage_table, names_of
from rlhf.evaluation.tables import (
    COLUMNS,
    OVEROPTIMIZATION,
    PREFERENCES,
    SIMULATED,
    bands_in_words,
    curves_table,
    exposure_in_words,
    exposure_table,
    kl_in_words,
    notes_in_words,
    preference_table,
    printable,
    prompts_in_words,
    signals_table,
    table_rows,
)
from rlhf.files import write_text
from rlhf.processes import by_main
from rlhf.records import transcript

MOST_SAMPLES = 200  # prompts whose responses are on the page
PRINTED = 20  # of them, on paper
CURVES = {
    "sft": ("loss", "eval_loss"),
    "rm": ("loss",),
    "ppo": ("score", "kl", "length", "entropy"),
}


@by_main
def write_page(
    path: Path,
    report: dict[str, Any],
    scored: Sequence[Scored],
    stages: Mapping[str, dict[str, Any]],
    seeds: Sequence[Sequence[str]] = (),
) -> None:
    """Write the page of a report; `stages` are the stage.json of all that the systems stand on, by folder.

    Of several evaluations together there are no samples: `scored` is empty then, and `seeds` a table of what
    each seed found.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    judges = {"gold": "gold", "judge": "the judge", "proxy": "proxy"}
    judged = {rate["judge"] for rate in report["win_rates"]}
    main = _main_system(report, scored) if scored else None
    page = environment.get_template("page.html.j2").render(
        report=report,
        nonce=hashlib.sha256(json.dumps(report, default=str).encode()).hexdigest()[:32],
        simulated=SIMULATED,
        scores=[list(COLUMNS), *table_rows(report)],
        notes=notes_in_words(report | {"gates": []}),  # they stand above
        plots=list(_plots(report, scored, [judge for judge in judges if judge in judged])),
        prompts=prompts_in_words(report),
        kl_explained=kl_in_words(report),
        preferences_explained=PREFERENCES,
        preferences={judges[j]: preference_table(report, j) for j in judges if j in judged},
        signals=signals_table(report),
        highest=[row | {"prompt": as_text(row["prompt"])} for row in report.get("highest", ())],
        judged_system=main and main.system.name,
        overoptimization_explained=OVEROPTIMIZATION,
        overoptimization=curves_table(report),
        exposure_explained=exposure_in_words(report),
        exposure=exposure_table(report),
        curves=list(_curves(stages)),
        orders=_orders(report["baseline"], main.system.name) if main else {},
        samples=list(_samples(report["baseline"], main, scored)) if main else [],
        printed=PRINTED,
        seeds=seeds,
        bands=bands_in_words(report),
        origins=lineage_table(stages),
        settings=dict(_settings(stages)),
    )
    write_text(path, page)


def as_text(prompt: Any) -> str:
    """A prompt as text: that of one turn, or all of a conversation."""
    is_one_turn = not isinstance(prompt, str) and len(prompt) == 1
    return prompt[0]["content"] if is_one_turn else transcript(prompt)


def _main_system(report: dict[str, Any], scored: Sequence[Scored]) -> Scored:
    """The system that the verdict is on."""
    name = main_system(report)
    return next(each for each in scored if each.system.name == name)


def _plots(report: dict[str, Any], scored: Sequence[Scored], judges: Sequence[str]) -> Iterator[Markup]:
    for judge in judges:
        yield _svg(plots.plot_win_rates(report, judge), f"wins-{judge}")
    if plots.common_scorer(report) is not None:
        yield _svg(plots.plot_scores(report), "scores")
        yield _svg(plots.plot_diversity(report), "diversity")
    if any(entry["kl"] is not None for entry in report["systems"].values()):
        yield _svg(plots.plot_frontier(report), "frontier")
    if scored:
        lengths = {each.system.name: [len(g.tokens) for g in each.generations] for each in scored}
        yield _svg(plots.plot_lengths(lengths), "lengths")
    if report["overoptimization"]:
        yield _svg(plots.plot_overoptimization(report), "overoptimization")
    if report["excess_error_length"] is not None:
        yield _svg(plots.plot_excess_error(report), "excess")


def _curves(stages: Mapping[str, dict[str, Any]]) -> Iterator[Markup]:
    names = names_of(stages)
    for folder, record in stages.items():
        file = Path(folder) / "metrics.jsonl"
        if record["stage"] not in CURVES or not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [key for key in CURVES[record["stage"]] if sum(key in row for row in rows) > 1]
        if keys:
            yield _svg(plots.plot_curves(names[folder], rows, keys), folder)


def _shown(value: Any) -> Any:
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(value, keep="\n\t") if is_text else value


def _svg(figure: Any, name: str) -> Markup:
    return Markup(plots.as_svg(figure, name))  # matplotlib escapes the names in it


def _orders(baseline: str, name: str) -> dict[str, str]:
    return {
        "place": "place",
        "gold": f"gold of {name}, less {baseline}",
        "worst": f"gold of {baseline}, less {name}",
        "proxy": f"proxy of {name}",
        "length": f"length of {name}",
    }


def _samples(baseline: str, main: Scored, scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    [base] = [each for each in scored if each.system.name == baseline]
    for i in range(min(MOST_SAMPLES, len(base.generations))):
        gain = 0.0 if main.gold is None or base.gold is None else main.gold[i] - base.gold[i]
        yield {
            "prompt": as_text(base.generations[i].prompt),
            "orders": {
                "place": -i,
                "gold": gain,
                "worst": -gain,
                "proxy": 0.0 if main.proxy is None else main.proxy[i],
                "length": len(main.generations[i].tokens),
            },
            "rows": [
                {
                    "system": each.system.name,
                    "response": each.generations[i].response,
                    "gold": "-" if each.gold is None else f"{each.gold[i]:.2f}",
                    "proxy": "-" if each.proxy is None else f"{each.proxy[i]:.2f}",
                }
                for each in scored
            ],
        }


def _settings(stages: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The settings of every stage, as it wrote them down, with the versions of the libraries it used."""
    for folder, name in names_of(stages).items():
        file, versions = Path(folder) / "config.yaml", stages[folder].get("versions", {})
        if file.exists():
            used = ", ".join(f"{library} {version}" for library, version in versions.items())
            yield name, f"# {used}\n{file.read_text(encoding='utf-8')}"
