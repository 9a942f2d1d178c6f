"""`python -m eval.matrix A/report.json B/report.json ...`: encoders x language models x benchmarks, on one page.

Reads what `compare-runs` wrote for each language model, with the same arms. Nothing is worked out anew: scores,
differences to the baseline, intervals and verdicts are those of the reports.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from encoders.errors import DataError, UsageError, run_command
from eval.comparing.bootstrap import Difference
from eval.comparing.comparison import Measure
from eval.comparing.figures import interval_bar
from eval.comparing.markup import plain_table, text
from eval.comparing.report import PAGE, STYLE, write
from eval.comparing.report_tables import pill
from eval.comparing.summary import COLOURS, SIGNS, interval, label, number, signed, title

TOO_FEW_REPORTS = "a matrix is made of several reports: name two report.json or more, one for each language model"


@dataclass(frozen=True)
class Report:
    """What one language model's report.json says; `asked`: of each benchmark its questions, pictures,
    protocol and the fingerprint of the questions."""

    llm: str
    file: Path
    arms: list[str]
    seeds: list[int]
    encoders: list[set[str]]
    """Fingerprints of every arm's encoder: of the one that its LLaVA was made from, and of the tower that it has now,
    which a stage may have trained."""
    models: set[str]
    """Fingerprints of the LLaVAs."""
    asked: dict[str, tuple[int, int, Any, Any]]
    headline: dict[tuple[str, str], Measure]
    """(bench, metric) -> measure."""
    allowed: bool
    """Whether settings besides the encoder differ."""
    failed: int


@dataclass(frozen=True)
class Row:
    """One headline score; `cells` has a measure per language model, None where it was not asked."""

    bench: str
    metric: str
    cells: list[Measure | None]


@dataclass(frozen=True)
class Matrix:
    """All of them; every measure has a score per arm, and a difference per arm after the first."""

    llms: list[str]
    arms: list[str]
    seeds: list[list[int]]
    allowed: list[bool]
    failed: list[int]
    rows: list[Row]


def read_report(file: Path, llm: str) -> Report:
    """Read a report.json of compare-runs. Raises DataError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        runs = iter(content["runs"])
        arms = [[next(runs) for _ in range(count)] for count in content["seeds"]]
        headline = {
            (bench["bench"], measure["name"]): _measure(measure)
            for bench in content["benches"]
            for measure in bench["measures"]
            if measure["headline"]
        }
        return Report(
            llm=llm,
            file=file,
            arms=content["names"],
            seeds=content["seeds"],
            encoders=[{arm[0]["encoder"]["fingerprint"], arm[0].get("made_from")} - {None} for arm in arms],
            models={run["model"]["fingerprint"] for run in content["runs"]},
            asked={
                bench["bench"]: (
                    *(bench["questions"], bench["images"], bench["protocol"]),
                    bench["dataset"]["fingerprint"],
                )
                for bench in content["benches"]
            },
            headline=headline,
            allowed=content["allowed"],
            failed=sum(sum(bench["failed"]) for bench in content["benches"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise DataError(f"{file} is no report.json of compare-runs ({error!r}); run compare-runs again") from error


def _measure(raw: dict[str, Any]) -> Measure:
    differences = [Difference(**{f.name: one[f.name] for f in fields(Difference)}) for one in raw["differences"]]
    return Measure(**{f.name: raw[f.name] for f in fields(Measure)} | {"differences": differences})


def combine(reports: Sequence[Report]) -> Matrix:
    """Line the reports up. Raises UsageError for fewer than two, DataError if they have not the same arms in the same
    order, not the same encoders, asked other questions, or are about the same models."""
    if len(reports) < 2:
        raise UsageError(TOO_FEW_REPORTS)
    first = reports[0]
    for report in reports[1:]:
        if report.arms != first.arms:
            raise DataError(
                f"{first.file} compares {', '.join(first.arms)}, {report.file} {', '.join(report.arms)}; "
                "compare the same arms in the same order"
            )
        for arm, one, other in zip(first.arms, first.encoders, report.encoders, strict=True):
            if one.isdisjoint(other):
                raise DataError(
                    f"{arm} has another encoder in {report.file} than in {first.file}; compare the same ones"
                )
        for bench in sorted(first.asked.keys() & report.asked.keys()):
            if first.asked[bench][:2] != report.asked[bench][:2]:
                raise DataError(
                    f"{bench} has {first.asked[bench][0]} questions in {first.file}, {report.asked[bench][0]} in "
                    f"{report.file}; evaluate with the same --data and --limit"
                )
            if first.asked[bench] != report.asked[bench]:
                raise DataError(
                    f"{bench} is not asked alike in {first.file} and {report.file}: another protocol, or as many other "
                    "questions; evaluate with the same --data and one version of this toolkit"
                )
    for left, right in combinations(reports, 2):
        if left.models & right.models:
            raise DataError(f"{left.file} and {right.file} are about the same model; name one for each language model")
    keys = dict.fromkeys(key for report in reports for key in report.headline)
    return Matrix(
        llms=[report.llm for report in reports],
        arms=first.arms,
        seeds=[report.seeds for report in reports],
        allowed=[report.allowed for report in reports],
        failed=[report.failed for report in reports],
        rows=[Row(*key, [report.headline.get(key) for report in reports]) for key in keys],
    )


def verdict(matrix: Matrix, arm: int) -> str:
    """What became of one arm, language model by language model, in a sentence."""
    parts = []
    for at, llm in enumerate(matrix.llms):
        cells = [cell.differences[arm - 1].verdict for row in matrix.rows if (cell := row.cells[at]) is not None]
        counts = Counter(cells)
        few = counts["few images"]
        words = [f"{word} in {counts[word]}" for word in ("better", "worse") if counts[word]]
        if not words and few < len(cells):
            words = [f"within noise in {len(cells) - few}"]
        if few:
            words.append(f"too few images in {few}")
        parts.append(f"with {llm} {' and '.join(words)} of {len(cells)}")
    everywhere = [
        f"{name(row)} ({words[0]})"
        for row in matrix.rows
        if None not in row.cells
        and len(words := list({cell.differences[arm - 1].verdict for cell in row.cells if cell is not None})) == 1
        and words[0] in ("better", "worse")
    ]
    sentence = f"{matrix.arms[arm]} against {matrix.arms[0]}, headline scores: {'; '.join(parts)}."
    return sentence + (f" The same with every language model: {', '.join(everywhere)}." if everywhere else "")


def name(row: Row) -> str:
    """A headline score as the report calls it."""
    return f"{title(row.bench)} {label(row.metric)}"


def render(matrix: Matrix) -> str:
    """The page: self-contained, no script, every name escaped."""
    heading = f"{' and '.join(matrix.arms[1:])} against {matrix.arms[0]}, with {len(matrix.llms)} language models"
    leads = "".join(f'<p class="lead">{text(verdict(matrix, arm), 4000)}</p>' for arm in range(1, len(matrix.arms)))
    sections = [
        f"""<header>
{_alarms(matrix)}<p class="eyebrow">Encoder swap matrix</p>
<h1>{text(heading)}</h1>
{leads}
<ul class="facts">
<li>{len(matrix.arms)} encoders</li>
<li>{len(matrix.llms)} language models</li>
<li>{len(matrix.rows)} headline scores</li>
</ul>
</header>""",
        *(_differences(matrix, arm) for arm in range(1, len(matrix.arms))),
        _scores(matrix),
        _reading(matrix),
    ]
    return PAGE.format(title=text(heading), style=STYLE.read_text(encoding="utf-8"), body="\n".join(sections))


def _alarms(matrix: Matrix) -> str:
    alarms = [
        f"{llm}: settings besides the encoder differ and were let pass; the differences may come from these."
        for llm, allowed in zip(matrix.llms, matrix.allowed, strict=True)
        if allowed
    ]
    alarms += [
        f"{llm}: {failed:,} questions failed and count as wrong; these scores are lower bounds."
        for llm, failed in zip(matrix.llms, matrix.failed, strict=True)
        if failed
    ]
    return "".join(f'<p class="alarm">{text(alarm)}</p>\n' for alarm in alarms)


def _differences(matrix: Matrix, arm: int) -> str:
    """One arm beside the baseline: a row per score, a column per language model."""
    rows = []
    for row in matrix.rows:
        found = [(cell, cell.differences[arm - 1]) for cell in row.cells if cell is not None]
        edges = [abs(edge or 0) / cell.ceiling for cell, one in found for edge in (one.low, one.high)]
        cells = [_difference(cell, arm, max(edges)) for cell in row.cells]
        rows.append([text(name(row)), *cells])
    heading = f"{text(matrix.arms[arm])} minus {text(matrix.arms[0])}"
    return f"<section>\n<h2>{heading}</h2>\n{plain_table(['score', *map(text, matrix.llms)], rows)}\n</section>"


def _difference(cell: Measure | None, arm: int, reach: float) -> str:
    if cell is None:
        return "–"
    one = cell.differences[arm - 1]
    return (
        f"<strong>{signed(cell, one.value)}</strong> {pill(one.verdict)}<br>"
        f"{interval_bar(one, cell.ceiling, reach)}<small>{interval(cell, one)}</small>"
    )


def _scores(matrix: Matrix) -> str:
    """Every arm's own score."""
    head = ["score", *(f"{text(llm)}: {text(arm)}" for llm in matrix.llms for arm in matrix.arms)]
    rows = []
    for row in matrix.rows:
        cells = [
            "–" if cell is None else number(cell, cell.scores[arm])
            for cell in row.cells
            for arm in range(len(matrix.arms))
        ]
        rows.append([text(name(row)), *cells])
    return f"<section>\n<h2>Scores</h2>\n{plain_table(head, rows)}\n</section>"


def _reading(matrix: Matrix) -> str:
    count = sum(cell is not None for row in matrix.rows for cell in row.cells) * (len(matrix.arms) - 1)
    once = all(seed == 1 for seeds in matrix.seeds for seed in seeds)
    luck = (
        "Every model was trained once: the intervals do not cover the luck of training. That several language models "
        "agree says more than one narrow interval."
        if once
        else "Where an arm has several seeds the intervals cover the luck of training as well."
    )
    return f"""<section>
<h2>How to read this</h2>
<p>Differences are in percent, or in points of MME; intervals are those of 95 % from the report of each language model,
whose page has the details. Of {count} differences on this page, about one in twenty would exclude zero by chance alone.
{luck}</p>
<p>Compare down a column or along a row of differences. Scores of two language models differ for reasons that have
nothing to do with the encoders.</p>
</section>"""


def show(matrix: Matrix, page: Path) -> None:
    """Print a table per arm, a column per language model, and where the page is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for arm in range(1, len(matrix.arms)):
        heading = escape(f"{matrix.arms[arm]} against {matrix.arms[0]}")
        table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("score", no_wrap=True)
        for llm in matrix.llms:
            table.add_column(escape(llm))
        for row in matrix.rows:
            table.add_row(escape(name(row)), *(_words(cell, arm) for cell in row.cells))
        console.print(table)
        console.print(verdict(matrix, arm), markup=False)
    console.print(f"matrix: {page}", markup=False, soft_wrap=True)


def _words(cell: Measure | None, arm: int) -> str:
    if cell is None:
        return "–"
    one = cell.differences[arm - 1]
    word = f"[{COLOURS[one.verdict]}]{SIGNS[one.verdict]} {one.verdict}[/]"
    return f"{signed(cell, one.value)} ({interval(cell, one)}) {word}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, line the reports up, write the page and the same as JSON, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m eval.matrix", description=__doc__)
    parser.add_argument("reports", nargs="*", type=Path, metavar="REPORT.json", help="one for each language model")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page; JSON goes beside it")
    parser.add_argument("--name", nargs="+", help="what to call the language models (default: the files' names)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".html":
        raise UsageError(f"--out {args.out} must end in .html; the JSON is written beside it")
    names = args.name or [file.stem for file in args.reports]
    if len(names) != len(args.reports) or len(set(names)) != len(names):
        raise UsageError(f"--name gives {len(set(names))} different names to {len(args.reports)} reports")
    matrix = combine([read_report(file, llm) for file, llm in zip(args.reports, names, strict=True)])
    write(args.out, render(matrix), asdict(matrix))
    show(matrix, args.out)


if __name__ == "__main__":
    run_command(main)
