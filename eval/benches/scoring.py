"""What lmms-eval's own scoring says of each single answer: how right it is, and whether it could be read at all.

Tasks that score only the whole set (MMMU's aggregation, NoCaps's CIDEr) are asked for the parts that their sum is made
of, by their own code; `checked_metrics` (answers.py) then holds the parts against the printed whole.
"""

import ast
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from encoders.errors import DataError
from eval.benches.benchmarks import Bench
from eval.benches.data_check import LINE_BREAK

Sample = Mapping[str, Any]  # as lmms-eval logs it


@dataclass(frozen=True)
class Score:
    """Of one answer: `correct` (None if the task gives no score per question), `unparsed`, `category`."""

    correct: float | None
    unparsed: bool = False
    category: str = ""


def score_samples(bench: Bench, samples: Sequence[Sample]) -> list[Score]:
    """A score per logged sample, in their order. Raises DataError if lmms-eval recorded none for a sample."""
    if bench.task == "mme":
        return [_mme(bench, sample) for sample in samples]
    if bench.task == "pope":
        return [_pope(bench, sample) for sample in samples]
    if bench.task == "mmmu_val":
        return [_mmmu(sample) for sample in samples]
    if bench.task == "nocaps_val":
        return [Score(cider) for cider in caption_scores(samples)]
    return [Score(sample_score(bench, sample), category=_category(bench, sample)) for sample in samples]


def sample_score(bench: Bench, sample: Sample) -> float | None:
    """How correct one answer is by the first metric of the bench that lmms-eval recorded for it."""
    if not bench.metrics:
        return None
    for name in bench.metrics:
        if name in sample:
            entry = sample[name]
            return float(entry["score"] if isinstance(entry, Mapping) else entry)
    raise DataError(f"lmms-eval's task {bench.task} scored an answer without any of {', '.join(bench.metrics)}")


def caption_scores(samples: Sequence[Sample]) -> list[float]:
    """CIDEr of each caption, by the tokenizer and the scorer that lmms-eval's NoCaps task uses.

    Raises DataError for a text of several lines, after which the tokenizer would mix up the captions.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [[sample["nocaps_CIDEr"]["pred"], *sample["nocaps_CIDEr"]["answer"]] for sample in samples]
    for sample, (_, *references) in zip(samples, texts, strict=True):
        if broken := next((text for text in references if LINE_BREAK.search(text.replace("\n", " "))), None):
            raise DataError(f"nocaps: question {sample['doc_id']} has the reference {broken!r}, which is not one line")
    tokenizer = PTBTokenizer()
    said = tokenizer.tokenize({place: [{"caption": caption}] for place, (caption, *_) in enumerate(texts)})
    truth = tokenizer.tokenize({place: [{"caption": ref} for ref in refs] for place, (_, *refs) in enumerate(texts)})
    _, scores = Cider().compute_score(truth, said)
    return [float(score) for score in scores]


def _mme(bench: Bench, sample: Sample) -> Score:
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    unparsed = parse_pred_ans(_scored(sample)) == "other"
    return Score(sample_score(bench, sample), unparsed, _category(bench, sample))


def _pope(bench: Bench, sample: Sample) -> Score:
    unparsed = sample["pope_accuracy"]["prediction"] not in ("yes", "no")
    return Score(sample_score(bench, sample), unparsed, _category(bench, sample))


def _mmmu(sample: Sample) -> Score:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, get_multi_choice_info, parse_multi_choice_response

    entry, unparsed = sample["mmmu_acc"], False
    if entry["question_type"] == "multiple-choice":
        letters, choices = get_multi_choice_info(ast.literal_eval(sample["doc"]["options"]))
        before = random.getstate()
        parse_multi_choice_response(_scored(sample), choices, letters)
        unparsed = random.getstate() != before  # it draws a letter where it finds none
        random.setstate(before)
    return Score(float(evaluate_mmmu([entry])[1]["acc"]), unparsed, entry["subdomain"])


def _category(bench: Bench, sample: Sample) -> str:
    return str(sample["doc"][bench.category_column]) if bench.category_column is not None else ""


def _scored(sample: Sample) -> str:
    """The text that the task's process_results was given."""
    return str(sample["filtered_resps"][0]).strip()
