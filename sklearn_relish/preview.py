"""What a fit will read and cost, estimated before it from a sample of the texts."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.states.pairs import MATCH_BYTES, N_PAIR_VECTORS
from sklearn_relish.states.quantization import QUANTIZERS, n_rows
from sklearn_relish.states.reader import read_batches
from sklearn_relish.states.store import open_store
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import N_VECTORS, layers_to_read
from sklearn_relish.training.estimate import Plan, training_seconds, typical_states
from sklearn_relish.training.layer_search import SHARES
from sklearn_relish.training.search import TRAINING, Candidate
from sklearn_relish.training.trainer import AUTO_EPOCHS
from sklearn_relish.utils.progress import FitProgress, place_in_search

SAMPLE_TEXTS = 64  # that are read
WARM_UP_TEXTS = 16  # read before them, because the first texts of a process take longer
# By which the bar of a fit names a candidate of a search, and what it leaves out.
MAIN_VALUES = ("latent_size", "n_iterations")
NOT_SEARCHED = ("model", "prefix", "memory", "device", "dtype", "random_state", "verbose")


@dataclass(frozen=True)
class FitPreview:
    """What a fit will read and cost, see `RelishRegressor.preview`; `print` shows a summary.

    Attributes
    ----------
    texts : list of str
        The text of each row as the language model reads it, before it is cut.
    n_distinct : int
        Number of different texts; each is read once.
    layer : int
        The layer that is read.
    n_tokens : int
        Tokens that are read, of all different texts.
    longest : int
        Tokens of the longest text before it is cut; a lower bound for a very long text.
    n_cut : int
        Number of different texts that are cut.
    n_bytes : int
        Size of the kept states.
    read_seconds : float
        Estimated time to read the texts, if the states of none of them are kept.
    train_seconds : float
        Estimated time to train the heads. Ridge models are not included.

    Examples
    --------
    >>> from sklearn_relish import RelishRegressor
    >>> preview = RelishRegressor().preview(["dull", "fine", "splendid"] * 20)
    >>> n_bytes, seconds = preview.n_bytes, preview.read_seconds + preview.train_seconds
    """

    texts: list[str]
    n_distinct: int
    layer: int
    n_tokens: int
    longest: int
    n_cut: int
    n_bytes: int
    read_seconds: float
    train_seconds: float

    def __str__(self) -> str:
        cut = f"{self.n_cut:,} texts ({self.n_cut / self.n_distinct:.1%}) are cut"
        return (
            f"{len(self.texts):,} rows, {self.n_distinct:,} different texts, read up to layer"
            f" {self.layer}\n"
            f"Tokens of a text: {self.n_tokens / self.n_distinct:,.0f} on average, {self.longest:,}"
            f" at most; {cut}\n"
            f"Time, estimated: {_duration(self.read_seconds)} to read the texts,"
            f" {_duration(self.train_seconds)} to train the heads\n"
            f"Kept states: {self.n_bytes / 2**20:,.1f} MiB\n"
            f"The first text:\n{self.texts[0]}"
        )


class PreviewMixin:
    """The method `preview` of a regressor, and the progress of its fits."""

    def preview(self, X: ArrayLike) -> FitPreview:
        """Show what `fit` will make the language model read, and estimate what the fit will cost.

        A sample of up to 64 texts is read, and the heads are trained on them for a few steps.
        Nothing is kept, and the regressor does not change.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            As in `fit`.

        Returns
        -------
        FitPreview
            The texts, numbers of tokens, seconds and bytes; `print` shows a summary.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> preview = RelishRegressor().preview(["dull", "fine", "splendid"] * 20)
        >>> len(preview.texts), preview.n_distinct, preview.n_cut
        (60, 3, 0)
        """
        regressor: Any = self
        regressor._validate_params()
        with torch.inference_mode(False):
            return _preview(regressor._snapshot(), X)

    def _plan(
        self,
        n_texts: int,
        input_size: int,
        n_heads: int | None = None,
        is_partial: bool = False,
        *,
        head_options: dict[str, bool] | None = None,
    ) -> Plan:
        """The trainings of a fit or `partial_fit` on different texts with one output.

        None heads: those of a new fit. `head_options` are as of `TokenStates.head_options`.
        """
        regressor: Any = self
        loss_fn = regressor._loss_fn(np.ones(1))
        fraction = regressor.validation_fraction if regressor.early_stopping else 0.0
        n_held_out = 0 if is_partial else round(fraction * n_texts)
        training = {name: getattr(regressor, name) for name in TRAINING}
        if is_partial and training["max_epochs"] == "auto":
            training["max_epochs"] = AUTO_EPOCHS
        sizes = regressor._head_sizes(input_size, 1, loss_fn)
        candidate = Candidate({}, sizes | (head_options or {}), training)
        if n_heads is None:
            n_heads = regressor._n_estimators(n_texts, continuing=False)
        return Plan(
            [[candidate]] * n_heads,
            n_heads,
            n_texts - n_held_out,
            n_held_out,
            regressor._training_options(loss_fn),
        )

    def _fit_progress(self, n_texts: int, **known: Any) -> FitProgress:
        """The bar of a fit on a number of different texts; `known` is passed to `_plan`."""
        regressor: Any = self

        def estimate(mean_length: float) -> float:
            try:
                size = regressor._llm().hidden_size
                plan = self._plan(n_texts, size, **known)
                return training_seconds(plan, typical_states(n_texts, mean_length, size))
            except (RuntimeError, FloatingPointError, MemoryError):  # the fit goes on
                return math.nan

        place = place_in_search(getattr(regressor, "_callback_fit_ctx", None))
        return FitProgress(bool(regressor.verbose), estimate, place, self._values())

    def _values(self) -> str:
        """The values by which a candidate of a search is known.

        They are the sizes that are searched most, and the numbers and names among the parameters
        that differ from their defaults.
        """
        regressor: Any = self
        defaults = inspect.signature(type(self)).parameters
        return ", ".join(
            f"{name}={value}"
            for name, value in regressor.get_params(deep=False).items()
            if name in MAIN_VALUES
            or (
                isinstance(value, (Number, str))
                and name not in NOT_SEARCHED
                and value != defaults[name].default
            )
        )


def _preview(regressor: Any, X: Any) -> FitPreview:
    """The preview of a fit; `regressor` is a snapshot whose columns are set."""
    table = regressor._read_table(X, reset=True)
    texts, *further = regressor._texts_of_views(table)
    distinct = list(dict.fromkeys(itertools.chain(texts, *further)))
    n_texts, llm = len(distinct), regressor._llm()
    layer = llm.resolve_layer(max(SHARES) if regressor.layer == "auto" else regressor.layer)
    layers = layers_to_read([layer])
    reading = {
        "layers": layers,
        "max_length": regressor.max_length,
        "windows": regressor.long_text == "window",
    }
    chosen = np.random.RandomState(0).permutation(n_texts)[:SAMPLE_TEXTS]
    sample = [distinct[row] for row in chosen]
    for _ in read_batches(llm, sample[:WARM_UP_TEXTS], **reading):  # loads the model
        pass
    start = time.perf_counter()
    batches = list(read_batches(llm, sample, **reading))
    seconds = time.perf_counter() - start
    pieces = [piece for _, (states, *_), _ in batches for piece in states]
    n_read = np.array([len(piece) for piece in pieces])
    full_lengths = np.concatenate([lengths for _, _, lengths in batches])
    scale = n_texts / len(sample)
    n_tokens, n_cut = round(n_read.sum() * scale), round((full_lengths > n_read).sum() * scale)
    sample_tokens = n_read.sum()
    if isinstance(llm, FrozenLLM):  # other readers can't count tokens without reading
        del reading["layers"]
        n_read, full_lengths = llm.count_tokens(distinct, **reading)
        n_tokens, n_cut = int(n_read.sum()), int((full_lengths > n_read).sum())

    head_options = regressor._head_options()
    n_vectors = N_VECTORS + (N_PAIR_VECTORS if head_options["pair"] else 0)
    vector_bytes = n_vectors * pieces[0][0].nbytes if len(layers) > 1 else 0
    values, bits = torch.cat(pieces), open_store(regressor.memory).bits
    lengths = torch.tensor([len(piece) for piece in pieces])
    values = values if bits is None else QUANTIZERS[bits].quantize_texts(values, lengths)
    states = TokenStates.from_lengths(values, lengths)
    known = {}
    if further:  # the number of heads follows from that of the rows
        known["n_heads"] = regressor._n_estimators(len(set(texts)), continuing=False)
    plan = regressor._plan(n_texts, states.hidden_size, head_options=head_options, **known)
    return FitPreview(
        texts=texts,
        n_distinct=n_texts,
        layer=layer,
        n_tokens=n_tokens,
        longest=int(full_lengths.max()),
        n_cut=n_cut,
        n_bytes=(n_tokens + n_texts * n_rows(values, 0)) * values[0].nbytes
        + n_texts * vector_bytes
        + n_tokens * (MATCH_BYTES if head_options["pair"] else 0),
        read_seconds=seconds / sample_tokens * n_tokens,
        train_seconds=training_seconds(plan, states),
    )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6_000 else f"{seconds / 3_600:.1f} h"
