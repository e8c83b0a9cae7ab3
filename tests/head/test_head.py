import math

import pytest
import torch
from torch import nn

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead

TEXTBOOK_SIZES = {"latent_size": 32, "n_heads": 4, "n_iterations": 3}


class TextbookHead(nn.Module):
    """The published layout from PyTorch's own parts, with the weights of a `RelishHead`."""

    def __init__(self, head, n_heads):
        super().__init__()
        self.head = head
        self.attentions = nn.ModuleList()
        for block in head.blocks:
            theirs = block.attention
            ours = nn.MultiheadAttention(theirs.query.out_features, n_heads, batch_first=True)
            three = (theirs.query, theirs.key, theirs.value)
            ours.in_proj_weight.data = torch.cat([linear.weight.data for linear in three])
            ours.in_proj_bias.data = torch.cat([linear.bias.data for linear in three])
            ours.out_proj.load_state_dict(theirs.output.state_dict())
            self.attentions.append(ours)

    def forward(self, states, mask):
        head = self.head
        if head.state_norm == "rms":
            states = states / states.square().mean(-1, keepdim=True).sqrt()
        context = states @ head.projection.weight.T + head.projection.bias
        r = head.latent.expand(len(states), 1, -1)
        for i in range(head.n_iterations):
            block, attention = (
                head.blocks[i % len(head.blocks)],
                self.attentions[i % len(head.blocks)],
            )
            r = block.attention_norm(r + attention(r, context, context, key_padding_mask=~mask)[0])
            r = block.mlp_norm(r + block.mlp(r))
        return head.readout(r[:, 0])


def ragged_batch(n_texts=5, longest=11, size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n_texts,), generator=generator)
    lengths[0] = longest
    states = torch.randn(n_texts, longest, size, generator=generator) * 3
    return states, torch.arange(longest) < lengths[:, None]


def randomized(head):
    """The head with all parameters drawn at random, so that each has an influence."""
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return head


@pytest.mark.parametrize(
    ("input_size", "count"), [(4096, 3_418_625), (5120, 3_680_769), (5376, 3_746_305)]
)
def test_parameter_counts_are_the_published_ones(input_size, count):
    head = RelishHead(input_size)
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_shared_weights_have_one_block():
    head = RelishHead(4096, share_weights=True)
    assert sum(parameter.numel() for parameter in head.parameters()) == 3_418_625 - 2 * 789_760


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("state_norm", ["rms", None])
def test_agrees_with_the_textbook_in_values_and_gradients(
    share_weights, state_norm, folding, monkeypatch
):
    monkeypatch.setattr(RelishHead, "_folding_is_cheaper", lambda *_: folding)
    head = randomized(
        RelishHead(
            24, **TEXTBOOK_SIZES, n_outputs=2, share_weights=share_weights, state_norm=state_norm
        )
    )
    textbook = TextbookHead(head, TEXTBOOK_SIZES["n_heads"])
    states, mask = ragged_batch()
    torch.testing.assert_close(head(states, mask), textbook(states, mask), atol=1e-5, rtol=1e-5)

    # In float64 an error shows where float32 would round.
    head, textbook, states = head.double(), textbook.double(), states.double()
    ours, theirs = head(states, mask), textbook(states, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-7)

    head.zero_grad()
    ours.square().sum().backward()
    for block, attention in zip(head.blocks, textbook.attentions, strict=True):
        block_gradients = {
            name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None
        }
        attention.ours = block_gradients
    projection_gradient = head.projection.weight.grad.clone()
    latent_gradient = head.latent.grad.clone()

    head.zero_grad()
    theirs.square().sum().backward()
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(projection_gradient, head.projection.weight.grad, **close)
    torch.testing.assert_close(latent_gradient, head.latent.grad, **close)
    for attention in textbook.attentions:
        ours = attention.ours
        three = torch.cat([ours[f"attention.{name}.weight"] for name in ("query", "key", "value")])
        torch.testing.assert_close(three, attention.in_proj_weight.grad, **close)
        query, key, value = attention.in_proj_bias.grad.chunk(3)
        torch.testing.assert_close(ours["attention.query.bias"], query, **close)
        torch.testing.assert_close(ours["attention.value.bias"], value, **close)
        torch.testing.assert_close(key, torch.zeros_like(key), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            ours["attention.output.weight"], attention.out_proj.weight.grad, **close
        )


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("padding", [0.0, 1e4, math.nan])
def test_prediction_does_not_depend_on_batch_or_padding(padding, folding, monkeypatch):
    monkeypatch.setattr(RelishHead, "_folding_is_cheaper", lambda *_: folding)
    head = randomized(RelishHead(24, **TEXTBOOK_SIZES))
    states, mask = ragged_batch()
    together = head(states, mask)

    more = torch.full((len(states), 30, 24), padding)
    more[:, : states.shape[1]] = states.masked_fill(~mask[:, :, None], padding)
    more_mask = torch.zeros(len(states), 30, dtype=torch.bool)
    more_mask[:, : mask.shape[1]] = mask
    torch.testing.assert_close(head(more, more_mask), together, atol=1e-5, rtol=1e-5)

    for row, length in enumerate(mask.sum(1)):
        alone = head(states[[row], :length], mask[[row], :length])
        torch.testing.assert_close(alone, together[[row]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("n_texts", "n_tokens", "input_size", "folds"),
    [
        (64, 256, 576, True),
        (64, 100, 576, True),
        (64, 20, 576, False),
        (1, 40, 576, False),  # folding the weights costs too much for a single text
        (32, 40, 4096, False),
        (32, 256, 4096, True),
    ],
)
def test_projection_is_folded_where_that_is_cheaper(n_texts, n_tokens, input_size, folds):
    assert RelishHead(input_size)._folding_is_cheaper(n_texts, n_tokens, input_size) is folds


def test_state_norm_makes_the_scale_of_a_token_irrelevant():
    states, mask = ragged_batch()
    head = randomized(RelishHead(24, **TEXTBOOK_SIZES))
    louder = states.clone()
    louder[:, 0] *= 100
    torch.testing.assert_close(head(louder, mask), head(states, mask), atol=1e-4, rtol=1e-4)
    published = randomized(RelishHead(24, **TEXTBOOK_SIZES, state_norm=None))
    assert (published(louder, mask) - published(states, mask)).abs().max() > 1e-2


def test_initial_weights_are_those_of_pytorch_attention():
    torch.manual_seed(0)
    block = RelishHead(24, latent_size=256).blocks[0].attention
    theirs = nn.MultiheadAttention(256, 8)
    for linear in (block.query, block.key, block.value):
        assert linear.weight.std().item() == pytest.approx(
            theirs.in_proj_weight.std().item(), rel=0.05
        )
        assert not linear.bias.any()
    assert block.output.weight.std().item() == pytest.approx(
        theirs.out_proj.weight.std().item(), rel=0.05
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latent_size": 30, "n_heads": 4}, "latent_size=30 is not a multiple of n_heads=4"),
        ({"state_norm": "l2"}, "state_norm must be 'rms' or None"),
    ],
)
def test_wrong_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RelishHead(24, **wrong)


def test_a_text_without_tokens_is_refused_by_its_row():
    states, mask = ragged_batch()
    mask[[1, 3]] = False
    head = RelishHead(24, **TEXTBOOK_SIZES)
    for module in (head, RelishEnsemble([head], linear_path=True)):
        with pytest.raises(ValueError, match="False for all tokens of rows 1, 3"):
            module(states, mask)


def pair_batch():
    """A ragged batch, and matches of its tokens; some of them are compared with the mean."""
    states, mask = ragged_batch()
    generator = torch.Generator().manual_seed(2)
    share = torch.rand(mask.shape, generator=generator)
    matches = (share * mask.sum(dim=1)[:, None]).long()
    matches[torch.rand(mask.shape, generator=generator) < 0.2] = -1
    return states, mask, matches


@pytest.mark.parametrize("state_norm", ["rms", None])
def test_a_head_of_pairs_adds_how_tokens_differ_from_their_matches(state_norm):
    head = randomized(RelishHead(24, **TEXTBOOK_SIZES, state_norm=state_norm, pair=True)).double()
    size = TEXTBOOK_SIZES["latent_size"]
    plain = RelishHead(size, **TEXTBOOK_SIZES, state_norm=None).double()
    weights = {name: w for name, w in head.state_dict().items() if name != "difference.weight"}
    plain.load_state_dict(weights | {"projection.weight": torch.eye(size).double()})
    states, mask, matches = pair_batch()
    states = states.double()
    found = head(states, mask, matches)
    for row, (text, real) in enumerate(zip(states, mask, strict=True)):
        text = text[real]
        if state_norm == "rms":
            text = nn.functional.rms_norm(text, (24,), eps=1e-6)
        tokens = text @ head.projection.weight.T
        compared = [tokens.mean(dim=0) if m < 0 else tokens[m] for m in matches[row][real]]
        tokens = tokens + (tokens - torch.stack(compared)).abs() @ head.difference.weight.T
        expected = plain(tokens[None], torch.ones(1, len(text), dtype=torch.bool))
        torch.testing.assert_close(found[row], expected[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_the_prediction_for_a_pair_does_not_depend_on_batch_or_padding(padding):
    head = randomized(RelishHead(24, **TEXTBOOK_SIZES, pair=True)).double()
    ensemble = RelishEnsemble([head], linear_path=False)
    states, mask, matches = pair_batch()
    states = states.double().masked_fill(~mask[:, :, None], padding)
    together = ensemble(states, mask, matches.masked_fill(~mask, 99))
    torch.testing.assert_close(together, head(states, mask, matches))
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = states[row : row + 1, :length], mask[row : row + 1, :length]
        found = head(*alone, matches[row : row + 1, :length])
        torch.testing.assert_close(found[0], together[row], atol=1e-9, rtol=1e-9)


def test_a_head_of_pairs_needs_matches_and_another_one_ignores_them():
    states, mask, matches = pair_batch()
    head = RelishHead(24, **TEXTBOOK_SIZES)
    assert torch.equal(head(states, mask, matches), head(states, mask))
    of_pairs = RelishHead(24, **TEXTBOOK_SIZES, pair=True)
    for module in (of_pairs, RelishEnsemble([of_pairs], linear_path=True)):
        with pytest.raises(ValueError, match="pass matches, or a model that maps tokens"):
            module(states, mask)


def test_a_match_is_a_token_of_the_same_text():
    states, mask, matches = pair_batch()
    head = RelishHead(24, **TEXTBOOK_SIZES, pair=True)
    matches[0, 0] = states.shape[1]
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        head(states, mask, matches)


def test_gradients_of_a_head_of_pairs():
    head = randomized(RelishHead(4, latent_size=4, n_heads=2, n_iterations=1, pair=True)).double()
    states, mask = ragged_batch(n_texts=2, longest=3, size=4)
    states, matches = states.double().requires_grad_(), torch.zeros(2, 3, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda x: head(x, mask, matches), states)


def batch_in_both_orders():
    """A ragged batch of pairs, and the states of its tokens in the other order."""
    states, mask, matches = pair_batch()
    generator = torch.Generator().manual_seed(3)
    others = states + 0.1 * torch.randn(states.shape, generator=generator)
    return states.double(), mask, matches, others.double()


@pytest.mark.parametrize("state_norm", ["rms", None])
def test_a_head_of_both_orders_adds_how_states_differ_from_the_other_order(state_norm):
    sizes = TEXTBOOK_SIZES | {"state_norm": state_norm, "pair": True}
    head = randomized(RelishHead(24, **sizes, both_orders=True)).double()
    plain = RelishHead(48, **sizes | {"state_norm": None}).double()
    weights = head.state_dict()
    both = torch.cat([weights["projection.weight"], weights.pop("order_difference.weight")], 1)
    plain.load_state_dict(weights | {"projection.weight": both})
    states, mask, matches, others = batch_in_both_orders()
    found = RelishEnsemble([head], linear_path=False).double()(states, mask, matches, others)
    if state_norm == "rms":
        states, others = (nn.functional.rms_norm(x, (24,), eps=1e-6) for x in (states, others))
    expected = plain(torch.cat([states, states - others], dim=2), mask, matches)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_the_prediction_in_both_orders_does_not_depend_on_batch_or_padding(padding):
    head = randomized(RelishHead(24, **TEXTBOOK_SIZES, pair=True, both_orders=True)).double()
    ensemble = RelishEnsemble([head], linear_path=False)
    states, mask, matches, others = batch_in_both_orders()
    states, others = (x.masked_fill(~mask[:, :, None], padding) for x in (states, others))
    together = ensemble(states, mask, matches, others)
    torch.testing.assert_close(together, head(states, mask, matches, others))
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = [x[row : row + 1, :length] for x in (states, mask, matches, others)]
        torch.testing.assert_close(head(*alone)[0], together[row], atol=1e-9, rtol=1e-9)


def test_a_head_of_both_orders_needs_the_other_states_and_another_one_ignores_them():
    states, mask, matches, others = batch_in_both_orders()
    pair = RelishHead(24, **TEXTBOOK_SIZES, pair=True)
    assert torch.equal(pair(states, mask, matches, others), pair(states, mask, matches))
    both = RelishHead(24, **TEXTBOOK_SIZES, pair=True, both_orders=True)
    for module in (both, RelishEnsemble([both], linear_path=True)):
        with pytest.raises(ValueError, match="pass others, or a model that maps tokens"):
            module(states, mask, matches)
    with pytest.raises(ValueError, match="both_orders=True needs pair=True"):
        RelishHead(24, both_orders=True)


def test_gradients_of_a_head_of_both_orders():
    sizes = {"latent_size": 4, "n_heads": 2, "n_iterations": 1, "pair": True, "both_orders": True}
    head = randomized(RelishHead(4, **sizes)).double()
    states, mask = ragged_batch(n_texts=2, longest=3, size=4)
    states, matches = states.double().requires_grad_(), torch.zeros(2, 3, dtype=torch.int64)
    others = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(lambda x: head(x, mask, matches, others), states)
