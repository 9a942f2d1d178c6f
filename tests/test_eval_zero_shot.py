"""Retrieval ranks against a loop that sorts."""

import pytest
import torch
import torch.nn.functional as F

from encoders.errors import ModelError
from eval.zero_shot import chance_r1, recalls, retrieval_ranks


def test_ranks_equal_a_sorted_list_with_shared_captions() -> None:
    torch.manual_seed(0)
    captions = [f"caption {i % 7}" if i < 10 else f"own {i}" for i in range(30)]
    image, text = (F.normalize(torch.randn(30, 8), dim=-1) for _ in range(2))
    i2t, t2i = retrieval_ranks(image, text, captions)
    for queries, candidates, ranks in ((image, text, i2t), (text, image, t2i)):
        for i in range(30):
            order = sorted(range(30), key=lambda j: -float(queries[i] @ candidates[j]))
            hits = [place for place, j in enumerate(order) if captions[j] == captions[i]]
            assert int(ranks[i]) == hits[0]


def test_ties_go_against_the_query() -> None:
    same = F.normalize(torch.ones(4, 3), dim=-1)
    i2t, t2i = retrieval_ranks(same, same, list("abcd"))
    assert i2t.tolist() == t2i.tolist() == [3, 3, 3, 3]  # a collapsed encoder scores nothing


def test_a_broken_encoder_has_no_score() -> None:
    with pytest.raises(ModelError, match="not finite"):
        retrieval_ranks(torch.full((2, 3), torch.nan), torch.ones(2, 3), ["a", "b"])


def test_recalls_and_chance() -> None:
    ranks = torch.tensor([0, 1, 4, 9, 30])
    assert recalls(ranks, ranks)["i2t_r5"] == torch.tensor(0.6)
    assert [round(recalls(ranks, ranks)[f"t2i_r{k}"], 6) for k in (1, 5, 10)] == [0.2, 0.6, 0.8]
    assert chance_r1(["a", "a", "b", "c"]) == (2 / 4 + 2 / 4 + 1 / 4 + 1 / 4) / 4
