"""The comparison as one self-contained HTML page.

Nothing is loaded from elsewhere and no script runs: pictures are data URIs, figures are inline SVG, the style is in the
page, and every text that comes from a question, an answer, a setting or a run is escaped.
"""

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval.compare import BenchComparison, Comparison, Flip, Measure, RetrievalComparison
from eval.figures import interval_bar, overview, run_colour
from eval.summary import LABELS, SIGNS, TITLES, attestation, interval, measures, number, signed, verdict

FEW_PICTURES = 50
LONGEST_TEXT = 400
STYLE = Path(__file__).with_name("report.css")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def render(comparison: Comparison) -> str:
    """The page."""
    title = f"{' and '.join(comparison.names[1:])} against {comparison.names[0]}"
    sections = [
        _header(comparison, title),
        _overview(comparison),
        *([_retrieval(comparison.names, comparison.retrieval)] if comparison.retrieval else []),
        *(_bench(comparison.names, bench) for bench in comparison.benches),
        _gallery(comparison),
        _settings(comparison),
        _reading(comparison),
        _provenance(comparison),
    ]
    return PAGE.format(title=escape(title), style=STYLE.read_text(encoding="utf-8"), body="\n".join(sections))


def _header(comparison: Comparison, title: str) -> str:
    equal, sentence = attestation(comparison)
    questions = sum(bench.questions for bench in comparison.benches)
    empty = sum(sum(bench.empty) for bench in comparison.benches)
    lead = "".join(f'<p class="lead">{escape(verdict(comparison, at))}</p>' for at in range(1, len(comparison.names)))
    return f"""<header>
<p class="eyebrow">Encoder swap report</p>
<h1>{escape(title)}</h1>
{lead}
<ul class="facts">
<li class="{"good" if equal else "caution"}">{"✓" if equal else "!"} {escape(sentence)}</li>
<li>{questions:,} questions, each to {len(comparison.names)} models</li>
<li>{empty:,} of {questions * len(comparison.names):,} answers empty</li>
<li>{comparison.draws:,} bootstrap draws</li>
</ul>
</header>"""


def _overview(comparison: Comparison) -> str:
    rows = [(label, measure) for label, measure in measures(comparison) if measure.headline]
    legend = "".join(
        f'<span><i style="background:{run_colour(at)}"></i>{escape(name)}</span>'
        for at, name in enumerate(comparison.names)
    )
    small = [bench for bench in comparison.benches if bench.questions < bench.full_questions]
    sizes = ", ".join(f"{TITLES[bench.bench]} {bench.questions:,} of {bench.full_questions:,}" for bench in small)
    warning = (
        f'<p class="caution">Small sets of questions ({sizes}): these scores do not compare with published ones.</p>'
        if small
        else ""
    )
    return f"""<section>
<h2>At a glance</h2>
<p class="legend">{legend}</p>
{overview(rows, comparison.names)}
<p class="note">Both scales are in percent of the highest attainable score. Bars alone cannot say whether a difference
is real; the intervals on the right can. Coloured ones stay clear of zero, grey ones do not.</p>
{warning}
</section>"""


def _retrieval(names: Sequence[str], retrieval: RetrievalComparison) -> str:
    times = ", ".join(
        f"{escape(name)} {score / retrieval.chance_r1:.0f} ×"
        for name, score in zip(names, retrieval.measures[0].scores, strict=True)
    )
    return f"""<section>
<h2>The encoders alone: retrieval</h2>
<p>{retrieval.queries:,} held-out pictures and their captions. An order by chance has an R@1 of
{100 * retrieval.chance_r1:.2f} %; R@1 image to text as a multiple of that: {times}.</p>
{_tables(names, retrieval.measures)}
</section>"""


def _bench(names: Sequence[str], bench: BenchComparison) -> str:
    empty = ", ".join(f"{escape(name)} {count:,}" for name, count in zip(names, bench.empty, strict=True))
    few = (
        f'<p class="caution">Only {bench.images} pictures. With fewer than {FEW_PICTURES} the interval itself is '
        "rough, and too narrow rather than too wide.</p>"
        if bench.images < FEW_PICTURES
        else ""
    )
    return f"""<section>
<h2>{TITLES[bench.bench]}</h2>
<p>{bench.questions:,} questions on {bench.images:,} pictures. Empty answers: {empty}.</p>
{few}
{_tables(names, bench.measures)}
<details><summary>Protocol</summary>{_definitions(bench.protocol)}</details>
</section>"""


def _tables(names: Sequence[str], rows: Sequence[Measure]) -> str:
    """One table per run beside the baseline."""
    differences = [(measure, one) for measure in rows for one in measure.differences]
    reach = max(abs(edge or 0) / measure.ceiling for measure, one in differences for edge in (one.low, one.high))
    return "".join(_table(names, rows, run, reach) for run in range(1, len(names)))


def _table(names: Sequence[str], rows: Sequence[Measure], run: int, reach: float) -> str:
    lines = []
    for measure in rows:
        one = measure.differences[run - 1]
        unit = "%" if measure.percent else f"of {measure.ceiling:.0f}"
        pill = f'<span class="pill {one.verdict.split()[0]}">{SIGNS[one.verdict]} {one.verdict}</span>'
        lines.append(
            f"""<tr>
<th scope="row">{escape(LABELS.get(measure.name, measure.name))} <small>{unit}</small></th>
<td>{number(measure, measure.scores[0])}</td>
<td>{number(measure, measure.scores[run])}</td>
<td><strong>{signed(measure, one.value)}</strong></td>
<td class="interval">{interval_bar(one, measure.ceiling, reach)}<span>{interval(measure, one)}</span></td>
<td>{"" if one.detectable is None else number(measure, one.detectable)}</td>
<td class="word">{pill}</td>
</tr>"""
        )
    return f"""<div class="scroll"><table class="scores">
<thead><tr><th scope="col">measure</th><th scope="col">{escape(names[0])}</th><th scope="col">{escape(names[run])}</th>
<th scope="col">difference</th><th scope="col" class="interval">95 % interval</th>
<th scope="col">detectable</th><th scope="col" class="word">verdict</th></tr></thead>
<tbody>{"".join(lines)}</tbody>
</table></div>"""


def _gallery(comparison: Comparison) -> str:
    parts = []
    for bench in comparison.benches:
        for name, flips in zip(comparison.names[1:], bench.flips, strict=True):
            if flips.shown:
                cards = "".join(_card(comparison, name, flip) for flip in flips.shown)
                parts.append(
                    f"<h3>{TITLES[bench.bench]}: {escape(name)} gains {flips.gained:,} answers and loses {flips.lost:,}"
                    f" <small>{len(flips.shown)} of them, drawn at random</small></h3>"
                    f'<div class="cards">{cards}</div>'
                )
    content = "".join(parts) or "<p>No answer changed from right to wrong or back.</p>"
    return f"<section><h2>Answers that flipped</h2>{content}</section>"


def _card(comparison: Comparison, name: str, flip: Flip) -> str:
    picture = base64.b64encode(comparison.pictures[flip.image_id]).decode()
    question, _, rest = flip.prompt.strip().partition("\n")
    sides = zip((comparison.names[0], name), flip.answers, (not flip.gained, flip.gained), strict=True)
    answers = "".join(
        f'<li class="{"right" if right else "wrong"}"><span>{"✓" if right else "✗"}</span>'
        f"<b>{escape(run)}</b> <bdi>{escape(_text(answer)) or '(empty)'}</bdi></li>"
        for run, answer, right in sides
    )
    kind = "gained" if flip.gained else "lost"
    about = f"question {flip.index}" + (f", {escape(flip.category)}" if flip.category else "")
    return f"""<article class="{kind}">
<img alt="the picture of question {flip.index}" src="data:image/jpeg;base64,{picture}">
<p class="tag"><b>{kind}</b> {about}</p>
<p class="question"><bdi>{escape(_text(question))}</bdi></p>
<p class="note"><bdi>{escape(_text(rest))}</bdi></p>
<ul><li><span></span><b>expected</b> <bdi>{escape(_text(flip.target))}</bdi></li>{answers}</ul>
</article>"""


def _settings(comparison: Comparison) -> str:
    equal, sentence = attestation(comparison)
    others = _setting_table(comparison, encoder=False)
    warning = (
        f'<h3>Besides the encoder</h3><p class="note">A difference in the scores may come from these.</p>{others}'
        if others
        else ""
    )
    return f"""<section>
<h2>Settings</h2>
<p class="{"good" if equal else "caution"}">{escape(sentence)}.</p>
{warning}
<h3>The encoder</h3>
{_setting_table(comparison, encoder=True) or "<p>No difference.</p>"}
<details><summary>{len(comparison.shared)} settings that all runs share</summary>
{_definitions(comparison.shared)}</details>
</section>"""


def _setting_table(comparison: Comparison, encoder: bool) -> str:
    """The differing settings that do, or do not, describe the encoder; empty if there are none."""
    rows = [
        f"<tr>{''.join(f'<td><code>{escape(_text(cell))}</code></td>' for cell in (setting.key, *setting.values))}</tr>"
        for setting in comparison.differing
        if setting.encoder == encoder
    ]
    return _plain_table(("setting", *comparison.names), rows) if rows else ""


def _reading(comparison: Comparison) -> str:
    count = sum(1 for _ in measures(comparison)) * (len(comparison.names) - 1)
    return f"""<section>
<h2>How to read this</h2>
<p>Every question is answered by all models, so scores are compared question by question. The interval shows where
the difference falls when whole pictures are drawn anew with replacement ({comparison.draws:,} times, the same draws for
every model), because questions about one picture are not independent.</p>
<p><b>Better</b> and <b>worse</b> mean that the interval excludes zero. <b>Within noise</b> means that these questions
cannot tell, not that the models are equal. <b>Detectable</b> is the true difference that a set of this size finds four
times in five. Of {count} differences on this page, about one in twenty would exclude zero by chance alone.</p>
<p>The interval covers the choice of pictures, not the luck of training: another seed of either model moves its scores
as well. Small models and small sets show that the pipeline works, not how encoders rank at full size.</p>
</section>"""


def _provenance(comparison: Comparison) -> str:
    rows = []
    for run in comparison.runs:
        hashes = (run["results"], run["model"]["fingerprint"], run["encoder"]["fingerprint"])
        cells = "".join(f'<td><code title="{escape(full)}">{escape(full[:12])}</code></td>' for full in hashes)
        rows.append(
            f"<tr><td>{escape(run['name'])}</td><td><code>{escape(run['path'])}</code></td>"
            f"<td>{escape(run['created'])}</td>{cells}</tr>"
        )
    return f"""<section>
<h2>Provenance</h2>
{_plain_table(("run", "folder", "finished", "results", "model", "encoder"), rows)}
<p class="note">sha256 of the artifacts, first 12 digits. Bootstrap seed {comparison.seed}. The JSON file beside this
page holds the same numbers.</p>
</section>"""


def _plain_table(head: Sequence[str], rows: Sequence[str]) -> str:
    columns = "".join(f'<th scope="col">{escape(column)}</th>' for column in head)
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _definitions(content: dict[str, Any]) -> str:
    items = (f"<dt>{escape(key)}</dt><dd>{escape(_text(value))}</dd>" for key, value in content.items())
    return f"<dl>{''.join(items)}</dl>"


def _text(value: Any) -> str:
    """A value as text of bounded length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
