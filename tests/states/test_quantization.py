import pytest
import torch

from sklearn_relish.states.quantization import (
    QUANTIZERS,
    array_dtype,
    kept_dtype_name,
    quantizer_of,
    state_size,
)

# Odd sizes, sizes that no power of two divides often, and those of real models.
SIZES = [2, 6, 14, 24, 576, 640, 4096]
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


@pytest.mark.parametrize("form", QUANTIZERS.values(), ids=lambda form: f"{form.bits} bits")
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


@pytest.mark.parametrize("form", QUANTIZERS.values(), ids=lambda form: f"{form.bits} bits")
def test_zeros_stay_zeros_and_infinite_states_are_found(form):
    states = make(24)
    assert not form.dequantize(form.quantize(torch.zeros(3, 24))).any()
    assert not form.dequantize(torch.zeros_like(form.quantize(states))).any()  # padding
    assert form.is_finite(form.quantize(states))
    for value in (torch.inf, torch.nan):
        states[3, 5] = value
        assert not form.is_finite(form.quantize(states))


def test_eight_bits_are_within_a_sixteenth_of_each_value():
    form, states = QUANTIZERS[8], make(64)
    restored = form.dequantize(form.quantize(states)).float()
    error = (restored - states.float()).abs()
    largest = states.abs().amax(1, keepdim=True).float()
    assert (error <= states.abs().float() / 16 + largest * 2**-17).all()
    assert torch.equal(form.dequantize(form.quantize(restored)).float(), restored)


@pytest.mark.parametrize("size", [576, 640, 4096])
def test_four_bits_have_about_the_error_of_the_best_levels_for_a_gaussian(size):
    errors = relative_errors(QUANTIZERS[4], make(size, 1000)).square()
    assert 0.9 * LEVELS_ERROR < errors.mean() < 1.02 * LEVELS_ERROR
    assert errors.max() < 2 * LEVELS_ERROR


def test_one_large_value_does_not_hide_the_others():
    states = torch.randn(50, 576, generator=torch.Generator().manual_seed(0))
    states[:, 5] = 1000.0
    restored = QUANTIZERS[4].dequantize(QUANTIZERS[4].quantize(states)).float()
    others = torch.arange(576) != 5
    errors = (restored - states)[:, others].norm(dim=-1)
    # The error is about a tenth of the whole state, and is spread over all values.
    assert errors.max() < 0.15 * 1000
    assert (restored[:, 5] - 1000).abs().max() < 0.15 * 1000


def test_four_bits_need_an_even_size():
    with pytest.raises(ValueError, match=r"size 7 can't be kept in 4 bits.*even size.*bits=8"):
        QUANTIZERS[4].quantize(torch.ones(2, 7))


def test_names_of_the_forms():
    names = [kept_dtype_name(torch.bfloat16, bits) for bits in (None, 8, 4)]
    assert names == ["bfloat16", "bfloat16-8bit", "bfloat16-4bit"]
    assert [array_dtype(name) for name in names] == [torch.bfloat16, torch.uint8, torch.int8]
    assert array_dtype("bfloat16-3bit") is None
