import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from sklearn_relish.states.quantization import (
    QUANTIZERS,
    _largest,
    array_dtype,
    kept_dtype_name,
    n_rows,
    quantizer_of,
    state_size,
)

# Odd sizes, sizes that no power of two divides often, and those of real models.
SIZES = [4, 6, 14, 24, 576, 640, 4096]
forms = pytest.mark.parametrize("form", QUANTIZERS.values(), ids=lambda form: f"{form.bits} bits")
LEVELS_ERROR = 0.009497  # of the 16 levels, squared: Max (1960), table I


def make(size, n_tokens=200):
    """States as language models have them: one value is much larger, norms differ by far."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(n_tokens, size, generator=generator)
    states *= torch.logspace(-3, 4, n_tokens)[:, None]
    states[:, 0] *= 30
    states[7] = 0
    return states.bfloat16()


def relative_errors(form, states):
    """Norm of each token's error, divided by the norm of its state."""
    restored = form.dequantize(form.quantize(states)).double()
    error = (restored - states.double()).norm(dim=-1)
    return error / states.double().norm(dim=-1).clamp(min=1e-30)


@forms
@pytest.mark.parametrize("size", SIZES)
def test_a_state_depends_on_nothing_but_the_token(form, size):
    states = make(size)
    kept = form.quantize(states)
    assert kept.dtype == form.dtype
    assert quantizer_of(kept) is form
    assert state_size(kept) == size
    restored = form.dequantize(kept)
    assert restored.dtype == torch.bfloat16
    assert restored.shape == states.shape
    for row in (0, 7, 100):
        assert torch.equal(form.quantize(states[row]), kept[row])
        assert torch.equal(form.dequantize(kept[row]), restored[row])
        assert torch.equal(form.dequantize(kept[row : row + 1]), restored[row : row + 1])
    assert torch.equal(form.dequantize(kept.view(50, 4, -1)).view_as(restored), restored)


@forms
@pytest.mark.parametrize("size", SIZES)
def test_what_is_kept_of_a_text_depends_on_the_text_alone(form, size):
    states, lengths = make(size), torch.tensor([1, 120, 2, 77])
    kept = form.quantize_texts(states, lengths)
    texts = states.split(lengths.tolist())
    kept_texts = kept.split(n_rows(kept, lengths).tolist())
    restored = form.dequantize_texts(pad_sequence(kept_texts, batch_first=True), lengths)
    assert restored.shape == (4, 120, size)
    assert restored.dtype == torch.bfloat16
    for text, kept_text, found in zip(texts, kept_texts, restored, strict=True):
        assert torch.equal(found[len(text) - 1], text[-1])  # the last token is exact
        assert not found[len(text) :].any()  # padding
        length = torch.tensor([len(text)])
        assert torch.equal(form.quantize_texts(text, length), kept_text)
        alone = form.dequantize_texts(kept_text[None], length)[0]
        assert torch.equal(alone, found[: len(text)])
        errors = (alone - text).float().norm(dim=1) / text.float().norm(dim=1).clamp(min=1e-30)
        assert errors.max() < (1 / 16 if form.bits == 8 else 0.3)
        assert errors.square().mean() < (0.001 if form.bits == 8 else 1.2 * LEVELS_ERROR)


def test_four_bits_keep_values_that_vary_by_little():
    generator = torch.Generator().manual_seed(0)
    deviations = torch.logspace(-2, 0, 640)
    means = torch.randn(640, generator=generator) * deviations
    states = means + torch.randn(40, 640, generator=generator) * deviations
    lengths = torch.tensor([40])
    form = QUANTIZERS[4]
    restored = form.dequantize_texts(form.quantize_texts(states, lengths)[None], lengths)[0]
    errors = (restored.float() - states)[:-1].square().mean(0) / deviations.square()
    plain = form.dequantize(form.quantize(states)).float()
    assert errors.max() < 0.1
    assert (plain - states)[:, :100].square().mean() > 3 * deviations[:100].square().mean() / 4


@forms
def test_zeros_stay_zeros_and_infinite_states_are_found(form):
    states, lengths = make(24), torch.tensor([150, 50])
    assert not form.dequantize(form.quantize(torch.zeros(3, 24))).any()
    assert not form.dequantize(torch.zeros_like(form.quantize(states))).any()  # padding
    zeros = form.quantize_texts(torch.zeros(3, 24), torch.tensor([3]))
    assert not form.dequantize_texts(zeros[None], torch.tensor([3])).any()
    assert form.is_finite(form.quantize_texts(states, lengths), lengths)
    for token in (3, 149, 199):
        for value in (torch.inf, torch.nan):
            changed = states.clone()
            changed[token, 5] = value
            assert not form.is_finite(form.quantize_texts(changed, lengths), lengths)


def test_eight_bits_are_within_a_sixteenth_of_each_value():
    form, states = QUANTIZERS[8], make(64)
    restored = form.dequantize(form.quantize(states)).float()
    error = (restored - states.float()).abs()
    largest = states.abs().amax(1, keepdim=True).float()
    assert (error <= states.abs().float() / 16 + largest * 2**-17).all()
    assert torch.equal(form.dequantize(form.quantize(restored)).float(), restored)


@pytest.mark.parametrize("size", [576, 640, 4096])
def test_four_bits_have_about_the_error_of_the_best_levels_for_a_gaussian(size):
    states = torch.randn(1000, size, generator=torch.Generator().manual_seed(0))
    errors = relative_errors(QUANTIZERS[4], states).square()
    # A little less, since the largest values are exact.
    assert 0.8 * LEVELS_ERROR < errors.mean() < 1.02 * LEVELS_ERROR
    assert errors.max() < 2 * LEVELS_ERROR


@pytest.mark.parametrize("n_large", [1, 4])
def test_a_few_large_values_are_exact_and_do_not_hide_the_others(n_large):
    states = torch.randn(50, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    large = torch.arange(576) % 144 == 7
    large[7 + 144 * n_large :] = False
    states[:, large] = torch.tensor([1000.0, -2000.0, 40.0, 7e4])[:n_large].bfloat16()
    restored = QUANTIZERS[4].dequantize(QUANTIZERS[4].quantize(states))
    assert torch.equal(restored[:, large], states[:, large])
    rest = states[:, ~large].float()
    errors = (restored[:, ~large].float() - rest).norm(dim=1) / rest.norm(dim=1)
    assert errors.square().max() < 1.5 * LEVELS_ERROR


def test_the_first_of_equal_values_are_the_largest():
    states = torch.ones(3, 64)
    states[:, 40] = -2.0
    assert _largest(states).sort().values.tolist() == [[0, 1, 2, 40]] * 3


@pytest.mark.parametrize("size", [2, 7, 2**15])
def test_four_bits_need_an_even_size_in_a_range(size):
    with pytest.raises(ValueError, match=rf"size {size} can't be kept in 4 bits.*bits=8"):
        QUANTIZERS[4].quantize(torch.ones(2, size))
    with pytest.raises(ValueError, match=rf"size {size} can't be kept in 4 bits.*bits=8"):
        QUANTIZERS[4].quantize_texts(torch.ones(2, size), torch.tensor([2]))


def test_names_of_the_forms():
    names = [kept_dtype_name(torch.bfloat16, bits) for bits in (None, 8, 4)]
    assert names == ["bfloat16", "bfloat16-8bit", "bfloat16-4bit"]
    assert [array_dtype(name) for name in names] == [torch.bfloat16, torch.uint8, torch.int8]
    assert array_dtype("bfloat16-3bit") is None
