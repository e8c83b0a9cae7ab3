"""scikit-learn's own battery of estimator checks, none left out and none expected to fail."""

import tempfile
from pathlib import Path

import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from tiny import byte_tokenizer, tiny_model
from tokenizers import Regex, normalizers
from transformers import LlamaConfig, LlamaForCausalLM

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor, RelishRegressorCV


def model_that_reads_numbers() -> Path:
    """Folder of a tiny random model with a token for each column and whole number.

    A check wants an R² of 0.5 from numbers that are rendered to text. Predictions are shrunk to
    what was learned of held-out rows, and of single digits with random states nothing is learned.
    """
    folder = Path(tempfile.mkdtemp(prefix="tiny-numbers-"))
    tokenizer = byte_tokenizer("llama")
    # Further digits are not read.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"(?<=\d\.\d)\d+"), "")
    tokenizer.add_tokens(
        [f"x{column}: {sign}{n}" for column in range(32) for sign in ("", "-") for n in range(4)]
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class NamedLLM(FrozenLLM):
    """Without a temporary folder in its representation: it is part of the tests' names."""

    def __repr__(self):
        return f"FrozenLLM({self.model.rpartition('-')[0].rpartition('/')[2]!r})"


TINY = NamedLLM(tiny_model(), device="cpu", dtype="float32")
NUMBERS = NamedLLM(model_that_reads_numbers(), device="cpu", dtype="float32")
SMALL = {"max_length": 1024, "latent_size": 32, "n_heads": 4, "learning_rate": 3e-3}


@parametrize_with_checks(
    [
        RelishRegressor(
            NUMBERS,
            **SMALL,
            max_epochs=40,
            layer=2,
            early_stopping=False,
            n_estimators=1,
        ),
        RelishRegressor(
            NUMBERS,
            **SMALL,
            max_epochs=20,
            layer="auto",
            n_estimators=2,
        ),
    ]
)
def test_regressor(estimator, check):
    check(estimator)


@parametrize_with_checks(
    [
        RelishRegressorCV(
            NUMBERS,
            **SMALL,
            n_iterations=[1, 2],
            max_epochs=12,
            layer=2,
            cv=2,
        )
    ]
)
def test_search(estimator, check):
    check(estimator)


@parametrize_with_checks([LLMEncoder(TINY)])
def test_encoder(estimator, check):
    check(estimator)
