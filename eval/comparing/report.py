"""The comparison as one self-contained HTML page.

Nothing is loaded from elsewhere and no script runs: pictures are data URIs, figures are inline SVG, the style is in the
page, and every text that comes from a question, an answer, a setting or a run is escaped.
"""

import base64
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import UsageError
from eval.comparing.comparison import Comparison
from eval.comparing.figures import overview, run_colour
from eval.comparing.flips import Flip
from eval.comparing.markup import definitions, plain_table, text
from eval.comparing.report_tables import bench_section, cost_section, encoder_section, published_section
from eval.comparing.summary import attestation, covered, measures, title, verdict
from eval.comparing.views import Views

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


def render(comparison: Comparison, views: Views | None = None) -> str:
    """The page."""
    heading = f"{' and '.join(comparison.names[1:])} against {comparison.names[0]}"
    sections = [
        _header(comparison, heading),
        _overview(comparison),
        published_section(comparison),
        encoder_section(comparison),
        *([_views(comparison, views)] if views is not None else []),
        *(bench_section(comparison.names, bench) for bench in comparison.benches),
        _gallery(comparison),
        cost_section(comparison),
        _settings(comparison),
        _reading(comparison),
        _provenance(comparison),
    ]
    return PAGE.format(title=text(heading), style=STYLE.read_text(encoding="utf-8"), body="\n".join(sections))


def write(out: Path, page: str, content: Mapping[str, Any]) -> None:
    """The page, and its numbers as JSON beside it: after a crash the old files or the new ones are there, never a part.

    Raises UsageError if they cannot be written there.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_json(out.with_suffix(".json"), content)
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(out)
        manifest.fsync_directory(out.parent)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error}); name another file") from error
    finally:
        with suppress(OSError):  # of a folder that could not be made
            aside.unlink()


def _header(comparison: Comparison, heading: str) -> str:
    equal, sentence = attestation(comparison)
    questions = sum(bench.questions for bench in comparison.benches)
    runs = sum(comparison.seeds)
    counts = {
        what: sum(sum(getattr(bench, what)) for bench in comparison.benches) for what in ("empty", "unparsed", "failed")
    }
    lead = "".join(
        f'<p class="lead">{text(verdict(comparison, at), 4000)}</p>' for at in range(1, len(comparison.names))
    )
    return f"""<header>
{_alarms(comparison, counts["failed"])}<p class="eyebrow">Encoder swap report</p>
<h1>{text(heading)}</h1>
{lead}
<ul class="facts">
<li class="{"good" if equal else "caution"}">{"✓" if equal else "!"} {text(sentence)}</li>
<li>{questions:,} questions, each to {runs} models</li>
<li>of {questions * runs:,} answers {counts["empty"]:,} empty, {counts["unparsed"]:,} unparsed, {counts["failed"]:,}
failed</li>
<li>{comparison.draws:,} bootstrap draws</li>
</ul>
<p class="note">{text(covered(comparison), 4000)}</p>
</header>"""


def _alarms(comparison: Comparison, failed: int) -> str:
    alarms = []
    if comparison.allowed:
        keys = ", ".join(setting.key for setting in comparison.differing if setting.role == "other")
        alarms.append(
            f"Not a clean comparison: settings besides the encoder differ and were let pass: {keys}. "
            "A difference in the scores may come from these."
        )
    if failed:
        alarms.append(f"{failed:,} questions failed and count as wrong: these scores are lower bounds.")
    return "".join(f'<p class="alarm">{text(alarm, 4000)}</p>\n' for alarm in alarms)


def _overview(comparison: Comparison) -> str:
    rows = [(text(name), measure) for name, measure in measures(comparison) if measure.headline]
    legend = "".join(
        f'<span><i style="background:{run_colour(at)}"></i>{text(name)}</span>'
        for at, name in enumerate(comparison.names)
    )
    small = [bench for bench in comparison.benches if bench.questions < bench.full_questions]
    sizes = ", ".join(f"{title(bench.bench)} {bench.questions:,} of {bench.full_questions:,}" for bench in small)
    warning = (
        f'<p class="caution">Small sets of questions ({text(sizes)}): not comparable with published scores.</p>'
        if small
        else ""
    )
    return f"""<section>
<h2>At a glance</h2>
<p class="legend">{legend}</p>
{overview(rows, comparison.names) if rows else "<p>No measure with an interval.</p>"}
<p class="note">Both scales are in percent of the highest attainable score. Bars alone cannot say whether a difference
is real; the intervals on the right can. Coloured ones stay clear of zero, grey ones do not.</p>
{warning}
</section>"""


def _views(comparison: Comparison, views: Views) -> str:
    if views.missing:
        return f'<section><h2>What the encoders see</h2><p class="note">Not drawn: {text(views.missing)}</p></section>'
    rows = "".join(
        f'<h3>{text(name)}</h3><div class="views">{"".join(_picture(png, "image/png", name) for png in of_arm)}</div>'
        for name, of_arm in zip(comparison.names, views.pictures, strict=True)
    )
    return (
        f'<section><h2>What the encoders see</h2><p class="note">{text(views.caption, 4000)} Drawn from the small '
        f"pictures of this report.</p>{rows}</section>"
    )


def _picture(content: bytes, kind: str, about: str) -> str:
    return f'<img alt="{text(about)}" src="data:{kind};base64,{base64.b64encode(content).decode()}">'


def _gallery(comparison: Comparison) -> str:
    parts = []
    for bench in comparison.benches:
        for name, flips in zip(comparison.names[1:], bench.flips, strict=True):
            if flips.shown:
                cards = "".join(_card(comparison, name, flip) for flip in flips.shown)
                parts.append(
                    f"<h3>{text(title(bench.bench))}: {text(name)} gains {flips.gained:,} answers and loses "
                    f"{flips.lost:,} <small>{len(flips.shown)} of them, drawn at random</small></h3>"
                    f'<div class="cards">{cards}</div>'
                )
    content = "".join(parts) or "<p>No answer changed from right to wrong or back.</p>"
    first = " Of arms with several seeds, the first." if max(comparison.seeds) > 1 else ""
    note = f'<p class="note">An answer is right if it scores at least one half.{first}</p>'
    return f"<section><h2>Answers that flipped</h2>{note}{content}</section>"


def _card(comparison: Comparison, name: str, flip: Flip) -> str:
    shown = f"the picture of question {flip.index}"
    picture = _picture(comparison.pictures[flip.image_id], "image/jpeg", shown) if flip.image_id else ""
    question, _, rest = flip.prompt.strip().partition("\n")
    sides = zip((comparison.names[0], name), flip.answers, flip.scores, (not flip.gained, flip.gained), strict=True)
    answers = "".join(
        f'<li class="{"right" if right else "wrong"}"><span>{"✓" if right else "✗"}'
        f"{'' if score in (0, 1) else f' {score:.2f}'}</span>"
        f"<b>{text(arm)}</b> <bdi>{text(answer) or '(empty)'}</bdi></li>"
        for arm, answer, score, right in sides
    )
    kind = "gained" if flip.gained else "lost"
    about = f"question {flip.index}" + (f", {text(flip.category)}" if flip.category else "")
    return f"""<article class="{kind}">
{picture}
<p class="tag"><b>{kind}</b> {about}</p>
<p class="question"><bdi>{text(question)}</bdi></p>
<p class="note"><bdi>{text(rest)}</bdi></p>
<ul><li><span></span><b>expected</b> <bdi>{text(flip.target)}</bdi></li>{answers}</ul>
</article>"""


def _settings(comparison: Comparison) -> str:
    equal, sentence = attestation(comparison)
    parts = []
    for role, heading, note in (
        ("other", "Besides the encoder", "A difference in the scores may come from these."),
        ("encoder", "The encoder", "The swap itself, and what follows from it by its nature."),
        ("idle", "Without effect", "How the runs were carried out; no part in what they learned."),
    ):
        rows = [
            [f"<code>{text(cell)}</code>" for cell in (setting.key, *setting.values)]
            for setting in comparison.differing
            if setting.role == role
        ]
        if rows:
            table = plain_table(["setting", *map(text, comparison.names)], rows)
            parts.append(f'<h3>{heading}</h3><p class="note">{note}</p>{table}')
    return f"""<section>
<h2>Settings</h2>
<p class="{"good" if equal else "caution"}">{text(sentence)}.</p>
{"".join(parts)}
<details><summary>{len(comparison.shared)} settings that all runs share</summary>
{definitions(comparison.shared)}</details>
</section>"""


def _reading(comparison: Comparison) -> str:
    arms = len(comparison.names) - 1
    count = sum(1 for _ in measures(comparison)) * arms
    count += sum(len(part.measures) for bench in comparison.benches for part in bench.subtasks) * arms
    return f"""<section>
<h2>How to read this</h2>
<p>Every question is answered by all models, so scores are compared question by question. The standard error is that of
the difference when whole pictures are drawn anew with replacement ({comparison.draws:,} times, the same draws for every
model), because questions about one picture are not independent; where categories have pictures of their own, as in MME,
each category's pictures are drawn among themselves. The interval is the difference and Student's t times that error on
either side.</p>
<p><b>Better</b> and <b>worse</b> mean that the interval excludes zero. <b>Within noise</b> means that these questions
cannot tell, not that the models are equal. <b>Few images</b> means fewer than 50 pictures: too few for a verdict.
<b>Detectable</b> is the true difference that a set of this size finds four times in five. Of {count} differences on
this page, about one in twenty would exclude zero by chance alone.</p>
<p>{text(covered(comparison), 4000)} Where an arm has several seeds, its score is their mean, and what its seeds differ
by beyond what the choice of pictures explains counts as the luck of training.</p>
<p>Small models and small sets show that the pipeline works, not how encoders rank at full size.</p>
</section>"""


def _provenance(comparison: Comparison) -> str:
    rows = []
    for run in comparison.runs:
        hashes = (run["results"], run["model"]["fingerprint"], run["encoder"]["fingerprint"])
        cells = [f'<code title="{text(full)}">{text(full[:12])}</code>' for full in hashes]
        rows.append([text(run["name"]), f"<code>{text(run['path'])}</code>", text(run["created"]), *cells])
    return f"""<section>
<h2>Provenance</h2>
{plain_table(("arm", "folder", "finished", "results", "model", "encoder"), rows)}
<p class="note">sha256 of the artifacts, first 12 digits. Bootstrap seed {comparison.seed}. The JSON file beside this
page holds the same numbers.</p>
</section>"""
