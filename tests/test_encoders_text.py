"""Text towers against open_clip's, packed against padded, and the captioners against their definitions."""

from dataclasses import replace
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.attention import Combination, Packed, combination_mask
from encoders.captioner import ClipsCaptioner, CocaCaptioner, groups_of_similar_length
from encoders.config import CaptionerConfig, TextConfig
from encoders.text import TextOutput, TextTower

CLIP = TextConfig(kind="clip", vocab_size=40, length=12, width=32, layers=3, heads=2, activation="gelu", norm_eps=1e-5)
BERT = replace(CLIP, kind="bert", activation="gelu_tanh", norm_eps=1e-6)
LENGTHS = [12, 4, 7, 7, 5]


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, 39, (len(LENGTHS), 12))
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = 0
    return ids


def tower(config: TextConfig) -> TextTower:
    torch.manual_seed(0)
    built = TextTower(config, 16)
    for parameter in built.parameters():  # else positions and biases are too small to matter
        nn.init.normal_(parameter, std=0.3)
    return built


def open_clip_tower(ours: TextTower, **options: Any) -> nn.Module:
    """open_clip's text transformer with our weights."""
    config = ours.config
    theirs = open_clip.transformer.TextTransformer(
        context_length=config.length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=16,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        **options,
    )
    state = {
        "positional_embedding": ours.positions,
        "token_embedding.weight": ours.tokens.weight,
        "ln_final.weight": ours.norm.weight,
        "ln_final.bias": ours.norm.bias,
        "text_projection": ours.projection.weight.T,
    }
    names = {"norm1": "ln_1", "qkv": "attn.in_proj", "out": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc"}
    for i, block in enumerate(ours.blocks):
        for name, parameter in block.named_parameters():
            layer, _, kind = name.rpartition(".")
            layer = (names | {"fc2": "mlp.c_proj"})[layer]
            joint = "_" if layer == "attn.in_proj" else "."
            state[f"transformer.resblocks.{i}.{layer}{joint}{kind}"] = parameter
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name == "attn_mask" for name in missing)
    return theirs


@pytest.mark.parametrize("padding", ["reference", "packed"])
def test_causal_tower_equals_open_clip(ids: Tensor, padding: str) -> None:
    ours = tower(replace(CLIP, padding=padding))
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1] = 39  # open_clip pools at the largest id
    theirs = open_clip_tower(ours)
    torch.testing.assert_close(ours(ids, LENGTHS), theirs(ids), rtol=1e-5, atol=1e-5)


def test_bidirectional_reference_tower_equals_open_clip(ids: Tensor) -> None:
    ours = tower(replace(BERT, padding="reference"))
    theirs = open_clip_tower(
        ours, no_causal_mask=True, pool_type="last", act_layer=partial(nn.GELU, approximate="tanh")
    )
    torch.testing.assert_close(ours(ids, LENGTHS), theirs(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_packed_equals_each_text_by_itself(ids: Tensor, kind: str) -> None:
    """Pooled features, states and gradients, against a loop over texts that has no padding at all."""
    ours = tower(replace(CLIP if kind == "clip" else BERT, padding="packed")).double()
    packed = ours.with_states(ids, LENGTHS)
    assert packed.keep is not None
    alone = []
    for row, length in enumerate(LENGTHS):
        slots = list(range(length)) if kind == "clip" else [*range(length - 1), 11]
        states = ours.tokens(ids[row, slots]) + ours.positions[slots]
        mask = torch.full((length, length), -torch.inf).triu(1).double() if kind == "clip" else None
        for block in ours.blocks:
            query, key, value = block.qkv(block.norm1(states)).view(length, 3, 2, 16).permute(1, 2, 0, 3)
            weight = query @ key.mT / 4 + (0 if mask is None else mask)
            states = states + block.out((weight.softmax(-1) @ value).transpose(0, 1).flatten(1))
            states = states + block.fc2(block.activation(block.fc1(block.norm2(states))))
        alone.append(ours.projection(ours.norm(states[-1])))
        torch.testing.assert_close(packed.states[row, slots], states, rtol=0, atol=1e-10)
        assert packed.keep[row].nonzero().flatten().tolist() == slots
    torch.testing.assert_close(packed.pooled, torch.stack(alone), rtol=0, atol=1e-10)
    pull = torch.randn(len(LENGTHS), 16, dtype=torch.float64)
    expected = torch.autograd.grad((torch.stack(alone) * pull).sum(), list(ours.parameters()))
    found = torch.autograd.grad((packed.pooled * pull).sum(), list(ours.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_packed_equals_padded_for_causal_text(ids: Tensor) -> None:
    packed, padded = tower(replace(CLIP, padding="packed")), tower(replace(CLIP, padding="reference"))
    torch.testing.assert_close(packed(ids, LENGTHS), padded(ids, LENGTHS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("condition", "learnable"), [(3, 4), (1, 1), (5, 2)])
def test_combination_mask_is_that_of_the_paper(condition: int, learnable: int) -> None:
    mask = combination_mask(condition, learnable)
    for i in range(condition + learnable):
        for j in range(condition + learnable):
            both_condition = i < condition and j < condition
            learnable_to_condition = i >= condition and j < condition
            causal = i >= condition and j >= condition and i >= j
            assert bool(mask[i, j]) == (both_condition or learnable_to_condition or causal)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_under_the_combination_mask_equals_one_dense_softmax(padded: bool) -> None:
    torch.manual_seed(2)
    qkv = torch.randn(2, 9, 3, 2, 4, dtype=torch.float64)  # 5 condition positions, 4 queries
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]]) if padded else None
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mask = combination_mask(5, 4).expand(2, 1, 9, 9)
    if keep is not None:
        mask = mask & F.pad(keep, (0, 4), value=True)[:, None, None, :]
    weight = (query @ key.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weight @ value).transpose(1, 2)
    torch.testing.assert_close(Combination(5, 4, qkv.device, keep)(qkv), expected, rtol=0, atol=1e-10)


TARGETS = torch.tensor([[7, 8, 2, -100, -100, -100], [9, 2, -100, -100, -100, -100]])


@pytest.fixture(params=["self", "cross"])
def captioner(request: pytest.FixtureRequest) -> ClipsCaptioner:
    torch.manual_seed(1)
    config = CaptionerConfig(fusion=request.param, tokens=6, width=32, layers=2, heads=4)
    return ClipsCaptioner(config, 24, 20, "bert", 50).double()


def test_captioner_sees_the_condition_and_nothing_later(captioner: ClipsCaptioner) -> None:
    torch.manual_seed(3)
    patches, states = torch.randn(2, 4, 24).double(), torch.randn(2, 5, 20).double()

    def loss(patches: Tensor, states: Tensor, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        return captioner(patches, TextOutput(states[:, 0], states, keep), targets)

    base = loss(patches, states, TARGETS)
    # Each target has its own term: the loss of both rows is the sum of each alone, however rows are grouped.
    alone = sum(loss(patches[i : i + 1], states[i : i + 1], TARGETS[i : i + 1]) for i in range(2))
    torch.testing.assert_close(base, alone, rtol=0, atol=1e-10)
    # A later target adds its own term and changes no earlier one.
    longer = torch.tensor([[7, 8, 2, 5, -100, -100], [9, 2, -100, -100, -100, -100]])
    only_later = torch.tensor([[-100, -100, -100, 5, -100, -100], [-100] * 6])
    both = base + loss(patches, states, only_later)
    torch.testing.assert_close(loss(patches, states, longer), both, rtol=0, atol=1e-10)
    # Every patch and every text state but the class position is a condition.
    for place in range(4):
        moved = patches.clone()
        moved[:, place] += 1
        assert not torch.allclose(loss(moved, states, TARGETS), base)
    for place in range(5):
        moved = states.clone()
        moved[:, place] += 1
        assert torch.allclose(loss(patches, moved, TARGETS), base) == (place == 4)
    # Padding of a packed text tower is no condition.
    keep = torch.tensor([[True, True, True, False, True]] * 2)
    moved = states.clone()
    moved[:, 3] += 1
    torch.testing.assert_close(loss(patches, moved, TARGETS, keep), loss(patches, states, TARGETS, keep))


@pytest.mark.parametrize("fusion", ["self", "cross"])
def test_coca_predicts_each_token_from_the_picture_and_the_tokens_before(fusion: str) -> None:
    """The same cross-entropy as open_clip's CoCaLoss, from logits that see no later state."""
    torch.manual_seed(4)
    config = CaptionerConfig(fusion=fusion, width=32, layers=2, heads=4)
    captioner = CocaCaptioner(config, 24, 20, 50).double()
    patches, states = torch.randn(2, 4, 24).double(), torch.randn(2, 6, 20).double()
    hidden = captioner.decoder._run(captioner.image_condition(patches), None, captioner.text_query(states))
    logits = captioner.decoder.head(captioner.decoder.norm(hidden))  # (B,Q,V)
    padded = TARGETS.where(TARGETS != -100, 0)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    _, expected = open_clip.loss.CoCaLoss(2.0, 0.0, pad_id=0)(zero, zero, logits, padded, torch.tensor(1.0).double())
    found = captioner(patches, states, TARGETS) / (TARGETS != -100).sum() * 2.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    later = states.clone()
    later[0, 3:] += 1
    later[1, 2:] += 1
    torch.testing.assert_close(captioner(patches, later, TARGETS), captioner(patches, states, TARGETS))


def test_rows_are_grouped_up_to_their_longest_caption() -> None:
    targets = torch.full((9, 10), -100)
    lengths = [3, 1, 10, 4, 4, 0, 7, 2, 5]
    for row, length in enumerate(lengths):
        targets[row, :length] = 5
    groups = list(groups_of_similar_length(targets))
    assert sorted(int(row) for rows, _ in groups for row in rows) == list(range(9))
    for rows, longest in groups:
        assert longest == max(1, max(lengths[row] for row in rows.tolist()))
    assert sum(len(rows) * longest for rows, longest in groups) < 9 * 10 * 0.7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_variable_length_kernel_equals_rows_of_equal_length(causal: bool) -> None:
    torch.manual_seed(5)
    packed = Packed(LENGTHS, 12, torch.device("cuda"), causal=causal, last_in_last_slot=not causal)
    qkv = torch.randn(sum(LENGTHS), 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    pull = torch.randn(sum(LENGTHS), 2, 64, device="cuda")
    results = []
    for x in (qkv, qkv.detach().float().requires_grad_()):  # float32 takes the other branch
        output = packed(x)
        (output.float() * pull).sum().backward()
        results.append((output.float(), x.grad.float()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
