"""Zero-shot scores against plain loops that know nothing of tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.errors import ModelError
from eval.zero_shot.scores import (
    IGNORED,
    accuracies,
    chance_miou,
    chance_r1,
    class_embeddings,
    confusion,
    mean_iou,
    recalls,
    retrieval_ranks,
    segment,
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def first_hit(query: Tensor, candidates: Tensor, hits: list[bool]) -> int:
    """Place of the first hit in the sorted list of candidates."""
    order = sorted(range(len(candidates)), key=lambda j: -float(query @ candidates[j]))
    return next(place for place, j in enumerate(order) if hits[j])


def test_ranks_equal_a_sorted_list_with_shared_captions() -> None:
    torch.manual_seed(0)
    captions = [f"caption {i % 7}" if i < 10 else f"own {i}" for i in range(30)]
    image, text = unit(30, 8), unit(30, 8)
    i2t, t2i = retrieval_ranks(image, text, captions)
    for queries, candidates, ranks in ((image, text, i2t), (text, image, t2i)):
        for i in range(30):
            assert int(ranks[i]) == first_hit(queries[i], candidates, [other == captions[i] for other in captions])


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_with_several_captions_per_picture(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.zero_shot.scores.QUERIES", 7)  # several chunks, the last one short
    torch.manual_seed(1)
    owners = [picture for picture in range(20) for _ in range(1 + picture % 5)]
    captions = [f"caption {place % 23}" for place in range(len(owners))]
    said = {
        picture: {c for c, owner in zip(captions, owners, strict=True) if owner == picture} for picture in range(20)
    }
    image, text = unit(20, 6), unit(len(owners), 6)
    i2t, t2i = retrieval_ranks(image, text, captions, owners, shared)

    def hit(picture: int, place: int) -> bool:
        return captions[place] in said[picture] if shared else owners[place] == picture

    texts = range(len(owners))
    assert i2t.tolist() == [first_hit(image[p], text, [hit(p, j) for j in texts]) for p in range(20)]
    assert t2i.tolist() == [first_hit(text[j], image, [hit(p, j) for p in range(20)]) for j in texts]
    hits = sum(hit(p, j) for p in range(20) for j in texts)
    assert chance_r1(captions, owners, shared) == hits / (20 * len(owners))


def test_a_hit_at_k_is_any_own_caption_among_the_k_nearest() -> None:
    """The published definition, as clip-benchmark has it: over the k best of a score matrix, 5 captions a picture."""
    torch.manual_seed(2)
    image, text, owners = unit(40, 5), unit(200, 5), [place // 5 for place in range(200)]
    found = recalls(*retrieval_ranks(image, text, ["same words"] * 200, owners, shared=False))
    scores, owner = text @ image.T, torch.tensor(owners)
    for k in (1, 5, 10):
        of_texts = (scores.topk(k, dim=1).indices == owner[:, None]).any(dim=1)
        of_images = (owner[scores.T.topk(k, dim=1).indices] == torch.arange(40)[:, None]).any(dim=1)
        assert found[f"t2i_r{k}"] == pytest.approx(of_texts.float().mean().item(), abs=1e-7)
        assert found[f"i2t_r{k}"] == pytest.approx(of_images.float().mean().item(), abs=1e-7)


def test_ties_go_against_the_query() -> None:
    same = F.normalize(torch.ones(4, 3), dim=-1)
    i2t, t2i = retrieval_ranks(same, same, list("abcd"))
    assert i2t.tolist() == t2i.tolist() == [3, 3, 3, 3]  # a collapsed encoder scores nothing


def test_a_broken_encoder_has_no_score() -> None:
    broken, sound = torch.full((2, 4, 3), torch.nan), torch.ones(2, 3)
    with pytest.raises(ModelError, match="not finite"):
        retrieval_ranks(broken[0, :2], sound, ["a", "b"])
    with pytest.raises(ModelError, match="not finite"):
        accuracies(sound, broken[0, :2], [0, 1])
    with pytest.raises(ModelError, match="not finite"):
        class_embeddings(broken)
    with pytest.raises(ModelError, match="not finite"):
        segment(broken, sound, [(0, 0), (0, 2)], (2, 4))


def test_recalls_and_chance() -> None:
    ranks = torch.tensor([0, 1, 4, 9, 30])
    assert recalls(ranks, ranks)["i2t_r5"] == torch.tensor(0.6)
    assert [round(recalls(ranks, ranks)[f"t2i_r{k}"], 6) for k in (1, 5, 10)] == [0.2, 0.6, 0.8]
    assert chance_r1(["a", "a", "b", "c"]) == (2 / 4 + 2 / 4 + 1 / 4 + 1 / 4) / 4


def test_accuracies_equal_a_sorted_list() -> None:
    torch.manual_seed(3)
    image, classes, labels = unit(60, 4), unit(9, 4), [int(i) for i in torch.randint(8, (60,))]  # class 8 has none
    ranks = [first_hit(image[i], classes, [c == labels[i] for c in range(9)]) for i in range(60)]
    right = {label: [r == 0 for r, own in zip(ranks, labels, strict=True) if own == label] for label in set(labels)}
    found = accuracies(image, classes, labels)
    assert found["top1"] == pytest.approx(sum(r == 0 for r in ranks) / 60)
    assert found["top5"] == pytest.approx(sum(r < 5 for r in ranks) / 60)
    assert found["class_mean"] == pytest.approx(sum(sum(r) / len(r) for r in right.values()) / len(right))
    assert found["class_mean"] != pytest.approx(found["top1"])


def test_of_classes_that_tie_the_first_wins() -> None:
    same = F.normalize(torch.ones(7, 3), dim=-1)
    found = accuracies(same, same, [0, 0, 0, 1, 4, 5, 6])
    assert found["top1"] == pytest.approx(3 / 7)
    assert found["top5"] == pytest.approx(5 / 7)


def test_prompts_are_averaged_and_then_normalised() -> None:
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    half = 0.5**0.5
    torch.testing.assert_close(class_embeddings(prompts), torch.tensor([[half, half], [0.0, 1.0]]))


def upsampled(grid: list[list[float]], row: int, column: int, side: int) -> float:
    """Bilinear value at a pixel's centre, edges held."""
    cells = len(grid)

    def along(pixel: int) -> tuple[int, int, float]:
        at = min(max((pixel + 0.5) * cells / side - 0.5, 0.0), cells - 1.0)
        return int(at), min(int(at) + 1, cells - 1), at - int(at)

    (y0, y1, v), (x0, x1, u) = along(row), along(column)
    top, bottom = (grid[y][x0] * (1 - u) + grid[y][x1] * u for y in (y0, y1))
    return top * (1 - v) + bottom * v


def test_segments_equal_a_loop_over_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.zero_shot.scores.CLASSES", 3)
    torch.manual_seed(4)
    patches, classes, places, size = unit(2, 9, 5).double(), unit(7, 5).double(), [(0, 0), (0, 4)], (8, 12)
    found = segment(patches, classes, places, size)
    scores = (patches.float() @ classes.float().T).double()  # (W,9,C)
    for row in range(8):
        for column in range(12):
            seen = []
            for window, (top, left) in enumerate(places):
                if 0 <= column - left < 8:
                    grids = scores[window].T.reshape(7, 3, 3).tolist()
                    seen.append([upsampled(grid, row - top, column - left, 8) for grid in grids])
            mean = [sum(values) / len(seen) for values in zip(*seen, strict=True)]
            assert int(found[row, column]) == mean.index(max(mean))


def test_confusion_and_iou_equal_a_loop_over_pixels() -> None:
    torch.manual_seed(5)
    prediction = torch.randint(5, (30, 20))
    truth = torch.where(torch.rand(30, 20) < 0.6, prediction, torch.randint(4, (30, 20)))  # class 4: mostly predicted
    truth[truth == 4] = IGNORED
    counts = [[0] * 5 for _ in range(5)]
    for t, p in zip(truth.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if t != IGNORED:
            counts[t][p] += 1
    matrix = confusion(prediction, truth, 5)
    assert matrix.tolist() == counts
    ious = []
    for c in range(4):
        both = sum(t == p == c for t, p in zip(truth.flatten().tolist(), prediction.flatten().tolist(), strict=True))
        ious.append(both / (sum(counts[c]) + sum(row[c] for row in counts) - both))
    assert mean_iou(matrix) == pytest.approx(sum(ious) / 4)  # class 4 is in no label: not averaged


def test_chance_iou_is_what_random_guessing_gets() -> None:
    torch.manual_seed(6)
    truth = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 300_000, replacement=True)
    guess = torch.randint(3, (300_000,))
    assert chance_miou(confusion(truth, truth, 3)) == pytest.approx(mean_iou(confusion(guess, truth, 3)), abs=2e-3)
