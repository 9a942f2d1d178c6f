"""The comparison in words: labels, numbers with their units, the verdict in sentences, the table on the terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.comparing.bootstrap import Difference
from eval.comparing.comparison import Comparison, Measure

TITLES = {
    "mme": "MME",
    "pope": "POPE",
    "gqa": "GQA",
    "textvqa": "TextVQA",
    "textvqa_ocr": "TextVQA with OCR tokens",
    "mmmu": "MMMU",
    "chartqa": "ChartQA",
    "nocaps": "NoCaps",
}
LABELS = {
    "mme_perception_score": "perception",
    "mme_cognition_score": "cognition",
    "mme_total_score": "sum of both",
    "mme_perception_acc": "perception, acc",
    "mme_perception_acc_plus": "perception, acc+",
    "mme_cognition_acc": "cognition, acc",
    "mme_cognition_acc_plus": "cognition, acc+",
    "pope_accuracy": "accuracy",
    "pope_f1_score": "F1",
    "pope_precision": "precision",
    "pope_recall": "recall",
    "pope_predicted_yes_ratio": "answers “yes”",
    "exact_match": "exact match",
    "mmmu_acc": "accuracy",
    "relaxed_overall": "relaxed accuracy",
    "relaxed_human_split": "human questions",
    "relaxed_augmented_split": "augmented questions",
    "nocaps_CIDEr": "CIDEr",
}
SIGNS = {"better": "▲", "worse": "▼", "differs": "◆", "mixed": "◆", "within noise": "●", "few images": "○"}
COLOURS = {
    "better": "green",
    "worse": "red",
    "differs": "yellow",
    "mixed": "yellow",
    "within noise": "dim",
    "few images": "dim",
}
FEW_POINTS = 10  # a score of at most so many needs more digits


def title(bench: str) -> str:
    """A benchmark's name as it is written; of a task of lmms-eval that is not built in, the task's."""
    return TITLES.get(bench, bench)


def label(metric: str) -> str:
    """What a metric is called in the report."""
    return LABELS.get(metric, metric)


def number(measure: Measure, value: float) -> str:
    """A score in the unit that is shown: percent, or points of the benchmark."""
    if measure.percent:
        return f"{100 * value:.1f}"
    return f"{value:.1f}" if measure.ceiling > FEW_POINTS else f"{value:.3f}"


def signed(measure: Measure, value: float) -> str:
    """A difference with its sign; one that rounds to zero has none."""
    text = number(measure, abs(value))
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def interval(measure: Measure, one: Difference) -> str:
    """The 95 % interval of a difference."""
    if one.low is None or one.high is None:
        return "none (one picture)"
    return f"{signed(measure, one.low)} to {signed(measure, one.high)}"


def measures(comparison: Comparison) -> Iterator[tuple[str, Measure]]:
    """Every measure with a label that names its section: retrieval first, then the benches."""
    if comparison.retrieval:
        yield from ((measure.name, measure) for measure in comparison.retrieval.measures)
    for bench in comparison.benches:
        for measure in bench.measures:
            yield f"{title(bench.bench)} {label(measure.name)}", measure


def attestation(comparison: Comparison) -> tuple[bool, str]:
    """Whether the encoder is the only difference, and a sentence that says so."""
    others = sum(setting.role == "other" for setting in comparison.differing)
    if others:
        return False, f"{others} setting{'s' * (others > 1)} besides the encoder differ{'s' * (others == 1)}"
    if unknown := list(dict.fromkeys(run["name"] for run in comparison.runs if not run["training_recorded"])):
        return False, (
            f"They were evaluated alike, but how {_and(unknown)} {'were' if len(unknown) > 1 else 'was'} trained, and "
            "with which language model, is not recorded"
        )
    if comparison.same_encoder:
        return False, "All runs use the same encoder and the same settings"
    seeds = " and, within an arm, the seed" if max(comparison.seeds) > 1 else ""
    return True, f"Everything but the encoder{seeds} is equal{_mixed_arms(comparison)}"


def _mixed_arms(comparison: Comparison) -> str:
    """Arms whose encoders were themselves trained with several seeds, or that mix encoders: which, nothing tells."""
    found = [setting for setting in comparison.differing if setting.key == "encoder.fingerprint"]
    mixed = [
        name
        for one in found
        for name, value in zip(comparison.names, one.values, strict=True)
        if isinstance(value, list)
    ]
    return f"; the runs of {_and(mixed)} have different encoders, taken for seeds of one" if mixed else ""


def covered(comparison: Comparison) -> str:
    """Which sources of chance the intervals cover, and which not."""
    once = [name for name, seeds in zip(comparison.names, comparison.seeds, strict=True) if seeds == 1]
    if len(once) == len(comparison.names):
        return (
            "The intervals cover the choice of pictures. They do not cover the luck of training: with one seed an arm, "
            "another seed of either model could move its scores further than the interval says."
        )
    counts = ", ".join(f"{name} {count}" for name, count in zip(comparison.names, comparison.seeds, strict=True))
    text = f"The intervals cover the choice of pictures and the luck of training (seeds: {counts})"
    return f"{text}; not the luck of {_and(once)}, trained with one seed." if once else f"{text}."


def verdict(comparison: Comparison, run: int) -> str:
    """What the numbers say about one run beside the baseline, in sentences made from them."""
    base, name = comparison.names[0], comparison.names[run]
    sentences = []
    if comparison.retrieval:
        first = comparison.retrieval.measures[0]
        one = first.differences[run - 1]
        sentences.append(
            f"On its own, the encoder of {name} ranks the right caption first for {number(first, first.scores[run])} % "
            f"of the pictures, that of {base} for {number(first, first.scores[0])} % (difference "
            f"{signed(first, one.value)}, 95 % interval {interval(first, one)}; chance "
            f"{100 * comparison.retrieval.chance_r1:.1f} %)."
        )
    headline = [
        (f"{title(bench.bench)} {label(measure.name)}", measure, measure.differences[run - 1])
        for bench in comparison.benches
        for measure in bench.measures
        if measure.headline
    ]
    found = {
        word: [
            f"{label} {signed(measure, one.value)} ({interval(measure, one)})"
            for label, measure, one in headline
            if one.verdict == word
        ]
        for word in ("better", "worse")
    }
    few = sum(one.verdict == "few images" for _, _, one in headline)
    noise = len(headline) - few - sum(map(len, found.values()))
    if few:
        sentences.append(f"{few} of {len(headline)} headline scores rest on too few pictures for a verdict.")
    if noise + few == len(headline):
        if noise:
            sentences.append(
                f"With the language model, {name} and {base} cannot be told apart by these questions: {noise} of "
                f"{len(headline)} headline scores differ within noise."
            )
        return " ".join(sentences)
    parts = [
        f"{word} in {len(labels)} of {len(headline)} headline scores: {_and(labels)}"
        for word, labels in found.items()
        if labels
    ]
    sentences.append(f"With the language model, {name} is {'; '.join(parts)}.")
    if noise:
        sentences.append(f"The other {noise} differ{'s' * (noise == 1)} within noise.")
    return " ".join(sentences)


def show(comparison: Comparison, page: Path) -> None:
    """Print the headline differences as a table per run, whether the settings are equal, and where the page is."""
    console = Console()
    for run, name in enumerate(comparison.names[1:], 1):
        title = escape(f"{name} against {comparison.names[0]}")
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("measure", no_wrap=True)
        for column in (comparison.names[0], name, "change", "95 % interval"):
            table.add_column(escape(column), justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for label, measure in measures(comparison):
            if measure.headline:
                one = measure.differences[run - 1]
                scores = (number(measure, measure.scores[at]) for at in (0, run))
                word = f"[{COLOURS[one.verdict]}]{SIGNS[one.verdict]} {one.verdict}[/]"
                table.add_row(label, *scores, signed(measure, one.value), interval(measure, one), word)
        console.print(table)
    console.print(f"{attestation(comparison)[1]}. {covered(comparison)}", markup=False)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
