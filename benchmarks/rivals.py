"""The rivals of RELISH, each a scikit-learn regressor on rows of two columns or on texts.

Every family of the published evaluation: counts of words (`tfidf_ridge`), a head on pooled states
(`pooled_linear`, `pooled_mlp`), a decoded number (`DecodingRegressor`), the expected number
(`ExpectationRegressor`, known as RAIL), a fine-tuned model (`LoRARegressor`), also for the expected
number (`RAFTRegressor`), and the published head (`published_relish`). Without a large language
model: sentence embeddings with a ridge or boosting (`embedded_ridge`, `embedded_boosting`), and a
fine-tuned cross-encoder (`CrossEncoderRegressor`).
"""

from __future__ import annotations

import copy
import math
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)

from sklearn_relish import LLMEncoder, RelishRegressor
from sklearn_relish.llm.loading import quiet_loading
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training import trainer

TUNING_ROWS = 24  # training rows on which a prompt is chosen
CANDIDATES = 11  # numbers between the lowest and the highest of the training rows
PENALTIES = np.logspace(0, 6, 25)  # of a ridge on standardized states
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def render(X: Any, template: str) -> list[str]:
    """A text of each row of a frame."""
    return [template.format_map(row) for row in X.to_dict("records")]


def tfidf_ridge(template: str) -> Any:
    """Words, pairs of words and pieces of words, counted; the penalty chosen by validation."""
    counts = make_union(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2),
        TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(2, 5), min_df=2),
    )
    penalties = {"ridge__alpha": np.logspace(-2, 2, 9)}
    return GridSearchCV(
        make_pipeline(
            FunctionTransformer(render, kw_args={"template": template}),
            counts,
            Ridge(solver="sparse_cg"),
        ),
        penalties,
        cv=3,
        scoring="neg_mean_squared_error",
    )


def pooled_linear(model: Any, **reading: Any) -> Any:
    """A ridge on pooled states, its penalty chosen by leave-one-out validation."""
    return make_pipeline(LLMEncoder(model, **reading), StandardScaler(), RidgeCV(PENALTIES))


def pooled_mlp(model: Any, random_state: int = 0, **reading: Any) -> Any:
    """An MLP on pooled states, early stopped, its penalty chosen by cross-validation."""
    mlp = MLPRegressor(
        hidden_layer_sizes=(256,),
        early_stopping=True,
        n_iter_no_change=10,
        random_state=random_state,
    )
    search = GridSearchCV(
        TransformedTargetRegressor(mlp, transformer=StandardScaler()),
        {"regressor__alpha": [0.1, 10.0, 100.0]},
        cv=3,
        scoring="neg_mean_squared_error",
    )
    return make_pipeline(LLMEncoder(model, **reading), StandardScaler(), search)


class WithoutMatches(RelishRegressor):
    """A RelishRegressor whose heads do not compare the tokens of two texts."""

    def _states(self, *arguments: Any, **more: Any) -> TokenStates:
        return replace(super()._states(*arguments, **more), matches=None)


class LatestWeights(WithoutMatches):
    """One whose heads have the weights of a training's steps, not their moving average.

    Only one may be fitted at a time in a process.
    """

    def fit(self, *arguments: Any, **more: Any) -> LatestWeights:
        with patch.object(trainer, "AVERAGED_SHARE", 0.0):
            return super().fit(*arguments, **more)


def published_relish(model: Any, **parameters: Any) -> RelishRegressor:
    """RELISH as published: the last layer, its states as they are, one head, one loss."""
    return LatestWeights(
        model,
        layer=-1,
        state_norm=None,
        deep_supervision=False,
        n_estimators=1,
        validation_fraction=0.1,
        linear_path=False,
        latent_size=256,
        learning_rate=5e-4,
        **parameters,
    )


class PairEmbedder(TransformerMixin, BaseEstimator):
    """Sentence embeddings u and v of two columns, embedded separately, and how they compare.

    The features of a row are u, v, |u - v|, u * v and the cosine of u and v.

    Parameters
    ----------
    model : str
        Folder of a Sentence Transformers model, or Hub id.
    device : str or torch.device
    """

    def __init__(self, model: str, *, device: str | torch.device = "cpu") -> None:
        self.model = model
        self.device = device

    def fit(self, X: Any, y: Any = None) -> PairEmbedder:
        return self

    def transform(self, X: Any) -> np.ndarray:
        from sentence_transformers import SentenceTransformer

        with quiet_loading():
            encoder = SentenceTransformer(self.model, device=str(self.device))
        u, v = (
            encoder.encode(list(X.iloc[:, i]), show_progress_bar=False).astype(np.float64)
            for i in range(2)
        )
        lengths = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
        cosine = (u * v).sum(axis=1) / np.maximum(lengths, 1e-12)
        return np.column_stack([u, v, np.abs(u - v), u * v, cosine])


def embedded_ridge(model: str, **options: Any) -> Any:
    """A ridge on sentence embeddings, its penalty chosen by leave-one-out validation."""
    return make_pipeline(PairEmbedder(model, **options), StandardScaler(), RidgeCV(PENALTIES))


def embedded_boosting(model: str, **options: Any) -> Any:
    """Boosted trees on sentence embeddings. Their defaults draw nothing below 10,000 rows."""
    return make_pipeline(PairEmbedder(model, **options), HistGradientBoostingRegressor())


class CrossEncoderRegressor(RegressorMixin, BaseEstimator):
    """A cross-encoder of Sentence Transformers, fine-tuned for regression on two columns, on a CPU.

    The defaults are those of `CrossEncoderTrainingArguments`. The loss, binary cross-entropy on
    scores scaled to 0..1, is that of the library's own example for the STS benchmark. The example
    has batches of 64, 4 epochs and a warm-up, which are too few steps for few rows. The evaluation
    starts from the encoder of all-MiniLM-L6-v2, with a new classifier: no package has the weights
    of a published cross-encoder.

    Parameters
    ----------
    model : str
        Folder of an encoder or of a Sentence Transformers model, or Hub id.
    n_epochs : int
    batch_size : int
    learning_rate : float
        Start of a linear schedule.
    random_state : int
    """

    def __init__(
        self,
        model: str,
        *,
        n_epochs: int = 3,
        batch_size: int = 8,
        learning_rate: float = 5e-5,
        random_state: int = 0,
    ) -> None:
        self.model = model
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> CrossEncoderRegressor:
        from datasets import Dataset
        from sentence_transformers.cross_encoder import (
            CrossEncoder,
            CrossEncoderTrainer,
            CrossEncoderTrainingArguments,
        )
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
        from transformers import PrinterCallback

        y = np.asarray(y, dtype=float)
        self.low_, self.high_ = y.min(), y.max()
        torch.manual_seed(self.random_state)  # draws the classifier
        with quiet_loading():
            self.network_ = CrossEncoder(self.model, num_labels=1, device="cpu")
        self.n_parameters_ = sum(weight.numel() for weight in self.network_.parameters())
        rows = {
            "sentence1": list(X.iloc[:, 0]),
            "sentence2": list(X.iloc[:, 1]),
            "score": (y - self.low_) / (self.high_ - self.low_),
        }
        with tempfile.TemporaryDirectory() as folder:
            arguments = CrossEncoderTrainingArguments(
                output_dir=folder,
                num_train_epochs=self.n_epochs,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                seed=self.random_state,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = CrossEncoderTrainer(
                self.network_,
                arguments,
                Dataset.from_dict(rows),
                loss=BinaryCrossEntropyLoss(self.network_),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return self

    def predict(self, X: Any) -> np.ndarray:
        pairs = list(zip(X.iloc[:, 0], X.iloc[:, 1], strict=True))
        scores = self.network_.predict(pairs, show_progress_bar=False)
        return scores.astype(float) * (self.high_ - self.low_) + self.low_


class _Prompted(RegressorMixin, BaseEstimator):
    """What the rivals that let the model speak share: examples before the question, one pass.

    Parameters
    ----------
    model : str
        Folder of a causal language model, or Hub id.
    template : str
        A row's text, up to where the number is due.
    instruction : str
        What comes first: the task and its scale.
    n_shots : int
        Rows of the training set, with their numbers, before the question; 0 for zero-shot.
    decimals : int
        Of the numbers.
    random_state : int
        Draws the examples, one from each of `n_shots` equal parts of the sorted targets.
    device : str or torch.device

    Attributes
    ----------
    chat_ : bool
        Whether the question goes through the model's chat template: if it has one, and that gave
        the lower error on some training rows.
    """

    def __init__(
        self,
        model: str,
        template: str,
        instruction: str,
        *,
        n_shots: int = 0,
        decimals: int = 0,
        random_state: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model
        self.template = template
        self.instruction = instruction
        self.n_shots = n_shots
        self.decimals = decimals
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> _Prompted:
        y = np.asarray(y, dtype=float)
        random = np.random.RandomState(self.random_state)
        parts = np.array_split(np.argsort(y), self.n_shots) if self.n_shots else []
        shots = random.permutation([random.choice(part) for part in parts]).astype(int)
        rows = X.to_dict("records")
        self.shots_ = [
            (self.template.format_map(rows[i]), f"{y[i]:.{self.decimals}f}") for i in shots
        ]
        self.mean_, self.low_, self.high_ = y.mean(), y.min(), y.max()
        self.tokenizer_ = AutoTokenizer.from_pretrained(self.model)
        self.network_ = _causal(self.model, str(self.device))
        self.chat_ = False
        if self.tokenizer_.chat_template:
            others = random.permutation(np.setdiff1d(np.arange(len(y)), shots))[:TUNING_ROWS]
            errors = {}
            for self.chat_ in (False, True):
                errors[self.chat_] = np.mean((self.predict(X.iloc[others]) - y[others]) ** 2)
            self.chat_ = min(errors, key=errors.__getitem__)
        return self

    def _conversation(self, text: str) -> tuple[str, str]:
        """What all rows have in common, and the whole of it with a row's text."""
        if self.chat_:
            turns = []
            for shot, number in self.shots_:
                turns += [
                    {"role": "user", "content": shot},
                    {"role": "assistant", "content": number},
                ]
            turns.append({"role": "user", "content": text})
            turns[0]["content"] = f"{self.instruction}\n\n{turns[0]['content']}"
            whole = self.tokenizer_.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            return whole[: whole.rindex(text)], whole
        shots = "".join(f"{shot} {number}\n\n" for shot, number in self.shots_)
        begins = self.tokenizer_("a").input_ids[0] == self.tokenizer_.bos_token_id
        common = f"{self.tokenizer_.bos_token if begins else ''}{self.instruction}\n\n{shots}"
        return common, common + text

    @torch.inference_mode()
    def _passes(self, X: Any) -> Iterator[tuple[Tensor, DynamicCache]]:
        """After each row: the logits of the next token, and the cache that goes on from there."""
        common = torch.empty(0, dtype=torch.int64)  # tokens that are in `prefix`
        prefix = DynamicCache()
        for row in X.to_dict("records"):
            before, whole = self._conversation(self.template.format_map(row))
            ids = self._ids(whole)
            if not len(common) or not torch.equal(ids[: len(common)], common):
                shared = self._ids(before)
                n_shared = int((ids[: len(shared)] == shared).cumprod(0).sum())
                common, prefix = ids[:n_shared], DynamicCache()
                if n_shared:
                    self.network_(common[None], past_key_values=prefix, logits_to_keep=1)
            cache = copy.deepcopy(prefix)
            rest = ids[None, len(common) :]
            logits = self.network_(rest, past_key_values=cache, logits_to_keep=1).logits
            yield logits[0, -1], cache

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer_(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64, device=self.network_.device)


class DecodingRegressor(_Prompted):
    """The number that the model writes, greedily; where it writes none, the training mean."""

    @torch.inference_mode()
    def predict(self, X: Any) -> np.ndarray:
        answers = []
        self.n_failures_ = 0
        for logits, cache in self._passes(X):
            ids: list[int] = []
            for _ in range(8):
                ids.append(int(logits.argmax()))
                written = self.tokenizer_.decode(ids, skip_special_tokens=True)
                if ids[-1] == self.tokenizer_.eos_token_id or "\n" in written.lstrip():
                    break
                last = torch.tensor([ids[-1:]], device=logits.device)
                logits = self.network_(last, past_key_values=cache).logits[0, -1]
            found = NUMBER.search(written)
            self.n_failures_ += found is None
            answers.append(self.mean_ if found is None else float(found[0]))
        return np.clip(answers, self.low_, self.high_)


class ExpectationRegressor(_Prompted):
    """RAIL: the mean of candidate numbers under the probabilities that the model gives them.

    Lukasik, Narasimhan, Menon, Yu and Kumar, "Regression Aware Inference with LLMs", EMNLP 2024.
    """

    @torch.inference_mode()
    def predict(self, X: Any) -> np.ndarray:
        numbers = [
            f"{number:.{self.decimals}f}"
            for number in np.linspace(self.low_, self.high_, CANDIDATES)
        ]
        if self.chat_:
            tokens = [self._ids(number + self.tokenizer_.eos_token) for number in numbers]
        else:  # as after the examples, where the next one begins: the letter itself is left out
            tokens = [self._ids(f" {number}\n\n{self.template[0]}")[:-1] for number in numbers]
        ids = pad_sequence(tokens, batch_first=True)  # (candidates, A)
        lengths = torch.tensor([len(some) for some in tokens], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        answers = []
        for first, cache in self._passes(X):
            cache.batch_repeat_interleave(len(ids))
            logits = self.network_(ids[:, :-1], past_key_values=cache).logits
            logits = torch.cat([first.expand(len(ids), 1, -1), logits], dim=1)
            likely = logits.float().log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0]
            probabilities = (likely * real).sum(1).double().softmax(0).cpu().numpy()
            answers.append(probabilities @ np.array(numbers, dtype=float))
        return np.array(answers)


class LoRARegressor(RegressorMixin, BaseEstimator):
    """The language model itself, fine-tuned through LoRA, with a linear head on the last token.

    Parameters
    ----------
    model, template : str
    rank : int
        Of the adapters, which every linear layer has.
    learning_rate : float
        Peak of a linear schedule with a warm-up of a tenth.
    n_epochs : int
        Passes over the rows, of which a tenth is held out; the best epoch's weights are kept.
    max_seconds : float
        The schedule ends after that time, if it is earlier. None: it does not.
    """

    _task_type = "SEQ_CLS"
    _loss = staticmethod(torch.nn.functional.huber_loss)

    def __init__(
        self,
        model: str,
        template: str,
        *,
        rank: int = 16,
        learning_rate: float = 5e-4,
        n_epochs: int = 3,
        batch_size: int = 8,
        max_seconds: float | None = None,
        max_length: int = 512,
        random_state: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model
        self.template = template
        self.rank = rank
        self.learning_rate = learning_rate
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.max_seconds = max_seconds
        self.max_length = max_length
        self.random_state = random_state
        self.device = device

    def _pretrained(self) -> PreTrainedModel:
        network = AutoModelForSequenceClassification.from_pretrained(
            self.model, num_labels=1, dtype=torch.bfloat16
        )
        network.config.pad_token_id = self.tokenizer_.pad_token_id or 0
        network.score.float()
        return network

    def _read_out(self, last: Tensor) -> Tensor:
        """Standardized predictions from the states of last tokens."""
        return self.network_.get_base_model().score(last)[:, 0]

    def fit(self, X: Any, y: Any) -> LoRARegressor:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.random_state)
        random = np.random.RandomState(self.random_state)
        self.tokenizer_ = AutoTokenizer.from_pretrained(self.model)
        network = self._pretrained()
        config = LoraConfig(
            task_type=self._task_type,
            r=self.rank,
            lora_alpha=2 * self.rank,
            lora_dropout=0.0,  # on a CPU it doubles the time of the forward pass
            target_modules="all-linear",
        )
        self.network_ = get_peft_model(network, config).to(self.device)
        trained = [weight for weight in self.network_.parameters() if weight.requires_grad]
        self.n_parameters_ = sum(weight.numel() for weight in trained)
        y = np.asarray(y, dtype=float)
        self.mean_, self.scale_, self.low_, self.high_ = y.mean(), y.std(), y.min(), y.max()
        targets = torch.tensor((y - self.mean_) / self.scale_).float()
        tokens = self._tokens(X)
        order = random.permutation(len(y))
        held_out, rows = np.split(order, [len(y) // 10])
        total = self.n_epochs * math.ceil(len(rows) / self.batch_size)
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.01)
        began, step, best = time.perf_counter(), 0, math.inf
        self.seconds_ = 0.0
        for _ in range(self.n_epochs):
            self.network_.train()
            for batch in self._batches(random.permutation(rows), tokens, random):
                elapsed = time.perf_counter() - began
                done = max(step / total, elapsed / (self.max_seconds or math.inf))
                if done >= 1:
                    break
                share = min(10 * (done + 1 / total), 1, (1 - done) / 0.9)
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * share
                loss = self._loss(self._answers(batch, tokens), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                step += 1
            self.seconds_ = time.perf_counter() - began
            loss = float(((self._predicted(held_out, tokens) - targets[held_out]) ** 2).mean())
            if loss < best:
                best, weights = loss, [weight.detach().clone() for weight in trained]
            if self.max_seconds is not None and self.seconds_ >= self.max_seconds:
                break
        with torch.no_grad():
            for weight, kept in zip(trained, weights, strict=True):
                weight.copy_(kept)
        return self

    def predict(self, X: Any) -> np.ndarray:
        tokens = self._tokens(X)
        answers = self._predicted(np.arange(len(tokens)), tokens)
        return answers.double().numpy() * self.scale_ + self.mean_

    def _tokens(self, X: Any) -> list[Tensor]:
        texts = [self.template.format_map(row) for row in X.to_dict("records")]
        ids = self.tokenizer_(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [torch.tensor(some) for some in ids]

    def _batches(self, rows: np.ndarray, tokens: list[Tensor], random: Any) -> Iterator[np.ndarray]:
        """Random batches whose texts are of like length."""
        pools = [
            rows[i : i + 8 * self.batch_size] for i in range(0, len(rows), 8 * self.batch_size)
        ]
        batches = []
        for pool in pools:
            pool = np.array(sorted(pool, key=lambda row: len(tokens[row])))
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        return iter([batches[i] for i in random.permutation(len(batches))])

    def _answers(self, rows: np.ndarray, tokens: list[Tensor]) -> Tensor:
        some = [tokens[row] for row in rows]
        lengths = torch.tensor([len(ids) for ids in some])
        ids = pad_sequence(some, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self.device)
        ids = ids.to(self.device)
        with torch.autocast(ids.device.type, torch.bfloat16):
            model = self.network_.get_base_model().model
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            last = hidden[torch.arange(len(some)), lengths - 1]
            return self._read_out(last).float().cpu()

    @torch.inference_mode()
    def _predicted(self, rows: np.ndarray, tokens: list[Tensor]) -> Tensor:
        self.network_.eval()
        order = np.array(sorted(rows, key=lambda row: len(tokens[row])))
        answers = torch.empty(len(tokens))
        for i in range(0, len(order), 32):
            answers[order[i : i + 32]] = self._answers(order[i : i + 32], tokens)
        return answers[rows]


class RAFTRegressor(LoRARegressor):
    """RAFT: LoRA trained on the squared error of the expected number, which is also predicted.

    Lukasik, Meng, Narasimhan, Chang, Menon, Yu and Kumar, "Better autoregressive regression with
    LLMs via regression-aware fine-tuning", ICLR 2025.

    The candidates are the digits 0 to 9, which stand for ten equally spaced numbers from the
    lowest to the highest of the training rows. A digit is one token, so one forward pass gives the
    probabilities of all candidates, normalized over them. Numbers such as 2.5 or 40 would be
    several tokens for SmolLM2 and Gemma 3, with a pass for each candidate.
    """

    _task_type = "CAUSAL_LM"
    _loss = staticmethod(torch.nn.functional.mse_loss)

    def _pretrained(self) -> PreTrainedModel:
        texts = [f" {digit}" for digit in range(10)]
        ids = self.tokenizer_(texts, add_special_tokens=False)["input_ids"]
        self.digits_ = [some.pop() for some in ids]
        self.before_ = torch.tensor(ids[0], dtype=torch.int64)  # such as the token of a space
        if any(some != ids[0] for some in ids):
            raise ValueError("RAFT needs a tokenizer that makes one token of each digit.")
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.bfloat16)

    def _tokens(self, X: Any) -> list[Tensor]:
        return [torch.cat([ids, self.before_]) for ids in super()._tokens(X)]

    def _read_out(self, last: Tensor) -> Tensor:
        weights = self.network_.get_base_model().get_output_embeddings().weight[self.digits_]
        numbers = np.linspace(self.low_, self.high_, len(self.digits_))
        numbers = torch.tensor((numbers - self.mean_) / self.scale_, device=last.device).float()
        with torch.autocast(last.device.type, enabled=False):
            return (last.float() @ weights.float().T).softmax(dim=1) @ numbers


def _causal(model: str, device: str) -> PreTrainedModel:
    if (model, device) not in _loaded:
        _loaded.clear()
        network = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")
        _loaded[model, device] = network.to(device).eval()
    return _loaded[model, device]


_loaded: dict[tuple[str, str], PreTrainedModel] = {}
