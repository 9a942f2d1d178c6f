"""The report's tables of scores: measures with their intervals, sub-tasks, published figures, encoders, cost."""

from collections.abc import Sequence

from eval.comparing.bootstrap import FEW_PICTURES, Difference
from eval.comparing.comparison import BenchComparison, Comparison, Measure, RetrievalComparison
from eval.comparing.encoder_figures import Parity
from eval.comparing.figures import interval_bar
from eval.comparing.markup import definitions, plain_table, text
from eval.comparing.summary import SIGNS, interval, label, number, signed, title

OPEN_SUBTASKS = 12  # rows that are shown without a click


def bench_section(names: Sequence[str], bench: BenchComparison) -> str:
    """One benchmark: counts, scores, sub-tasks, protocol."""
    counts = [
        f"{what}: {', '.join(f'{text(name)} {count:,}' for name, count in zip(names, values, strict=True))}"
        for what, values in (("empty", bench.empty), ("unparsed", bench.unparsed), ("failed", bench.failed))
    ]
    few = (
        f'<p class="caution">Only {bench.images} pictures: with fewer than {FEW_PICTURES} the interval is rough '
        "and there is no verdict.</p>"
        if bench.images < FEW_PICTURES
        else ""
    )
    verdicts = " ".join(f"{text(name)} {pill(word)}" for name, word in zip(names[1:], bench.verdicts, strict=True))
    source = {"dataset": bench.dataset} if bench.dataset is not None else {}
    return f"""<section>
<h2>{text(title(bench.bench))} <small>{verdicts}</small></h2>
<p>{bench.questions:,} questions on {bench.images:,} pictures. Answers {"; ".join(counts)}.</p>
{few}
{score_tables(names, [("", measure) for measure in bench.measures])}
{_subtasks(names, bench)}
{_points(names, bench)}
<details><summary>Protocol</summary>{definitions({**bench.protocol, **source})}</details>
</section>"""


def score_tables(names: Sequence[str], rows: Sequence[tuple[str, Measure]]) -> str:
    """One table per arm beside the baseline; a row's first word is the sub-task, if it is one's."""
    reach = max(
        (
            abs(edge) / measure.ceiling
            for _, measure in rows
            for one in measure.differences
            for edge in (one.low, one.high)
            if edge is not None
        ),
        default=0.0,
    )
    return "".join(_table(names, rows, arm, reach) for arm in range(1, len(names))) if rows else ""


def _table(names: Sequence[str], rows: Sequence[tuple[str, Measure]], arm: int, reach: float) -> str:
    lines = "".join(_line(subtask, measure, arm, reach) for subtask, measure in rows)
    return f"""<div class="scroll"><table class="scores">
<thead><tr><th scope="col">measure</th><th scope="col">{text(names[0])}</th><th scope="col">{text(names[arm])}</th>
<th scope="col">difference</th><th scope="col" class="interval">95 % interval</th>
<th scope="col">detectable</th><th scope="col" class="word">verdict</th></tr></thead>
<tbody>{lines}</tbody>
</table></div>"""


def _line(subtask: str, measure: Measure, arm: int, reach: float) -> str:
    one = measure.differences[arm - 1]
    unit = "%" if measure.percent else "" if measure.ceiling == 1 else f"of {measure.ceiling:.0f}"
    name = f"{text(subtask)}: {text(label(measure.name))}" if subtask else text(label(measure.name))
    return f"""<tr>
<th scope="row">{name} <small>{unit}</small></th>
<td>{number(measure, measure.scores[0])}{_seeds(measure, 0)}</td>
<td>{number(measure, measure.scores[arm])}{_seeds(measure, arm)}</td>
<td><strong>{signed(measure, one.value)}</strong></td>
<td class="interval">{interval_bar(one, measure.ceiling, reach)}<span>{interval(measure, one)}</span></td>
<td>{"" if one.detectable is None else number(measure, one.detectable)}</td>
<td class="word">{pill(one.verdict)}{_luck(measure, one)}</td>
</tr>"""


def pill(word: str) -> str:
    """A verdict in its colour."""
    return f'<span class="pill {word.split()[0]}">{SIGNS[word]} {word}</span>'


def _seeds(measure: Measure, arm: int) -> str:
    seeds = measure.seeds[arm]
    return f"<br><small>{', '.join(number(measure, score) for score in seeds)}</small>" if len(seeds) > 1 else ""


def _luck(measure: Measure, one: Difference) -> str:
    """How much of the standard error is the luck of training, where it is known."""
    if one.luck is None or one.error is None:
        return ""
    return f"<br><small>error {number(measure, one.error)}, of training {number(measure, one.luck)}</small>"


def _subtasks(names: Sequence[str], bench: BenchComparison) -> str:
    rows = [(part.name, measure) for part in bench.subtasks for measure in part.measures]
    if not rows:
        return ""
    small = sum(part.images < FEW_PICTURES for part in bench.subtasks)
    note = f"; {small} with fewer than {FEW_PICTURES} pictures get no verdict" if small else ""
    opened = " open" if len(rows) <= OPEN_SUBTASKS else ""
    return (
        f"<details{opened}><summary>{len(bench.subtasks)} sub-tasks{note}</summary>"
        f"{score_tables(names, rows)}</details>"
    )


def _points(names: Sequence[str], bench: BenchComparison) -> str:
    """What lmms-eval printed besides: figures that do not follow from scores of single questions."""
    if not bench.points:
        return ""
    rows = [
        [text(key), *(", ".join("" if value is None else f"{value:.6g}" for value in of_arm) for of_arm in values)]
        for key, values in bench.points.items()
    ]
    summary = "Further figures as lmms-eval printed them: no interval can be given for them"
    opened = "" if bench.measures else " open"
    return f"<details{opened}><summary>{summary}</summary>{plain_table(['figure', *map(text, names)], rows)}</details>"


def published_section(comparison: Comparison) -> str:
    """What papers print, beside ours where we measured the whole benchmark."""
    whole = [bench for bench in comparison.benches if bench.published and bench.questions == bench.full_questions]
    parts = [bench for bench in comparison.benches if bench.published and bench not in whole]
    if not whole + parts:
        return ""
    shown = _published(comparison, whole) if whole else ""
    hidden = (
        "<details><summary>Published figures of benchmarks that were not asked in full here: they do not compare with "
        f"the scores above</summary>{_published(comparison, parts, ours=False)}</details>"
        if parts
        else ""
    )
    return f"<section><h2>Published figures</h2>{shown}{hidden}</section>"


def _published(comparison: Comparison, benches: Sequence[BenchComparison], ours: bool = True) -> str:
    columns = [
        (bench, measure)
        for bench in benches
        for measure in bench.measures
        if any(measure.name in row.scores for row in bench.published)
    ]
    rows = []
    for arm, name in enumerate(comparison.names if ours else ()):
        scores = [number(measure, measure.scores[arm]) for _, measure in columns]
        rows.append([f"<strong>{text(name)}</strong> (ours)", *scores])
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    notes: dict[str, list[str]] = {}
    for bench in benches:
        for row in bench.published:
            notes[f"{row.paper}: {row.table}"] = row.notes
            of_model = found.setdefault((row.model, row.paper), {})
            of_model |= {(bench.bench, metric): score for metric, score in row.scores.items()}
    for (model, paper), of_model in found.items():
        printed = [of_model.get((bench.bench, measure.name)) for bench, measure in columns]
        rows.append(
            [
                f'{text(model)} <span class="published">published</span> <small>{text(paper)}</small>',
                *("" if score is None else f"{score:.1f}" for score in printed),
            ]
        )
    head = ["model", *(f"{text(title(bench.bench))}<br>{text(label(measure.name))}" for bench, measure in columns)]
    remarks = "".join(
        f"<li>{text(source)}: {text(' '.join(of_paper), 2000)}</li>" for source, of_paper in notes.items()
    )
    return (
        f'{plain_table(head, rows, "published")}<p class="note">Published figures were not measured here. Their '
        f'protocols differ from ours and from each other:</p><ul class="note">{remarks}</ul>'
    )


def encoder_section(comparison: Comparison) -> str:
    """The encoders alone: retrieval, eval-encoder's figures, parity of the export."""
    parts = [_retrieval(comparison.names, comparison.retrieval)] if comparison.retrieval is not None else []
    if comparison.zero_shot:
        rows = [
            [
                text(one.name),
                text(one.measure),
                f"{one.pictures:,}",
                *(f"{100 * score:.1f}" for score in one.scores),
                "" if one.chance is None else f"{100 * one.chance:.2f}",
            ]
            for one in comparison.zero_shot
        ]
        head = ["set", "measure, %", "pictures", *map(text, comparison.names), "chance"]
        parts.append(f"<h3>Zero-shot, as eval-encoder scored them</h3>{plain_table(head, rows)}")
    rows = [[text(name), *_parity(one)] for name, one in zip(comparison.names, comparison.parity, strict=True)]
    head = ["arm", "exported encoder", "largest relative error", "bound", "smallest cosine"]
    parts.append(
        f"<h3>Does the exported encoder compute what its source does?</h3>{plain_table(head, rows)}"
        '<p class="note">In float32, of the hidden states that a LLaVA reads (parity.json of the export).</p>'
    )
    return f"<section><h2>The encoders alone</h2>{''.join(parts)}</section>"


def _parity(one: Parity) -> list[str]:
    if one.relative_error is None or one.bound is None or one.cosine is None:
        return [f"not known: {text(one.missing)}", "", "", ""]
    origin = f"<br><small>{text(one.origin)}</small>" if one.origin else ""
    return [
        f"<code>{text(one.source)}</code>{origin}",
        f"{one.relative_error:.1e}",
        f"{one.bound:.0e}",
        f"{one.cosine:.6f}",
    ]


def _retrieval(names: Sequence[str], retrieval: RetrievalComparison) -> str:
    times = ", ".join(
        f"{text(name)} {score / retrieval.chance_r1:.0f} ×"
        for name, score in zip(names, retrieval.measures[0].scores, strict=True)
    )
    return f"""<h3>Retrieval</h3>
<p>{retrieval.queries:,} held-out pictures and their captions. An order by chance has an R@1 of
{100 * retrieval.chance_r1:.2f} %; R@1 image to text as a multiple of that: {times}.</p>
{score_tables(names, [("", measure) for measure in retrieval.measures])}"""


def cost_section(comparison: Comparison) -> str:
    """Time, memory and tokens of the evaluation, per benchmark and arm."""
    rows = []
    for bench in comparison.benches:
        for name, cost in zip(comparison.names, bench.costs, strict=True):
            seconds = (cost.seconds_encode, cost.seconds_answer, cost.seconds_score)
            asked = bench.questions - cost.answers_reused  # the others' time is not in the seconds
            each = (sum(seconds[:2]) / asked + cost.seconds_score / bench.questions) if asked > 0 else None
            rows.append(
                [
                    text(title(bench.bench)),
                    text(name),
                    *(f"{part:,.1f}" for part in seconds),
                    "" if each is None else f"{1000 * each:,.1f}",
                    f"{cost.prompt_tokens / bench.questions:,.1f}",
                    f"{cost.new_tokens / bench.questions:,.1f}",
                    f"{cost.peak_memory_bytes / 2**30:,.2f}",
                    f"{cost.answers_reused:,.0f}",
                ]
            )
    head = ["benchmark", "arm", "encode, s", "answer, s", "score, s", "ms a question"]
    head += ["prompt tokens a question", "new tokens a question", "peak memory, GiB", "reused"]
    return (
        f"<section><h2>Cost</h2>{plain_table(head, rows, 'numbers')}"
        '<p class="note">As measured when each arm was evaluated, seeds averaged; times compare only if the machines '
        "did. Reused answers are those of an interrupted evaluation: its time is not in the seconds.</p></section>"
    )
