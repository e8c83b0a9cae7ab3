"""`RelishRegressor`: scikit-learn's front door to a frozen language model and the RELISH head.

It checks what it is given and asks the other rooms in turn; it does no tensor maths itself.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import MultiOutputMixin, RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from sklearn_relish import hub as pretrained
from sklearn_relish.base import LLMReader
from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead, check_head_sizes
from sklearn_relish.head.losses import LOSSES, Loss, make_loss
from sklearn_relish.inputs.targets import read_targets
from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.states.store import StateStore
from sklearn_relish.training.conformal import Conformal
from sklearn_relish.training.inference import (
    attention_weights,
    predict_states,
    staged_predict_states,
)
from sklearn_relish.training.layer_search import SHARES, choose_layer, sample_texts
from sklearn_relish.training.stacking import fit_ensemble
from sklearn_relish.training.trainer import (
    AUTO_EPOCHS,
    Examples,
    auto_epochs,
    new_head,
    train_head,
)
from sklearn_relish.utils.messages import warn

# Estimators of a small set, up to which size it is one, and those of a larger set.
MANY, SMALL_SET, FEW = 5, 1_000, 3


class RelishRegressor(MultiOutputMixin, RegressorMixin, LLMReader):
    r"""Regression on texts: a frozen language model read by a latent iterative state head.

    Each text goes through the language model once; its token states are kept (see `memory`), and
    a small network, the RELISH head [1]_, is fitted on them: one learned latent state that attends
    to the token states a few times and is read out by a linear layer.

    Parameters
    ----------
    model : str, path or FrozenLLM, default="HuggingFaceTB/SmolLM2-135M"
        Hub id, local folder or path of a ``.gguf`` file of a language model, loaded once a process
        however many estimators name it; or a :class:`FrozenLLM`, shared and never copied.
    layer : int, float or "auto", default=0.6
        The layer whose states are read; none above it is computed. A number from 1 to the model's
        number of layers; a negative one counts from the end, and -1, the published choice, is the
        last after the final norm; a float in (0, 1] is a share of the depth. Layers past the
        middle tell more about a text than the last, which is bent on the next token. ``"auto"``
        compares the layers at 50, 55, 60 and 65 % of the depth on a sample of the rows and takes
        the one at 60 % unless another is clearly better; it costs a seventh more of reading at
        most.
    state_norm : {"rms", None}, default="rms"
        ``"rms"`` divides each token's state by its root mean square, which evens out the first
        token, a hundred times larger than others in middle layers. None is the published choice.
    prompt : str, default=None
        Template of a row's text, ``"Sentence 1: {premise}\nSentence 2: {hypothesis}"``, with a
        column's name for each field; ``{text}`` for one-dimensional `X`, ``{x0}``, ``{x1}``, ...
        for arrays. None: the text itself, or ``column: value`` lines for several columns.
    chat_template : bool, default=False
        Whether the text goes through the tokenizer's own chat template, as what a user says, up to
        where the model's answer begins.
    max_length : int, default=512
        Tokens that are read at once, never more than the model's window.
    long_text : {"truncate", "window"}, default="truncate"
        What becomes of longer texts. ``"truncate"`` cuts them, and counts them in a warning;
        ``"window"`` reads them in windows that overlap by a quarter, and the head attends to the
        states of all their tokens. That costs a third more than as many tokens in short texts.
    latent_size : int, default=256
        Size of the latent state; a multiple of `n_heads`.
    n_iterations : int, default=3
        How often the latent state is refined.
    n_heads : int, default=8
        Attention heads.
    share_weights : bool, default=False
        Whether all iterations use one block's weights.
    loss : {"huber", "squared_error", "absolute_error", "quantile", "poisson", "gamma"}, \
            default="huber"
        Loss on the standardized target. Huber's is squared up to one standard deviation and
        linear beyond. ``"absolute_error"`` asks for the median. ``"poisson"``, for counts and
        amounts of 0 or more, and ``"gamma"``, for amounts above 0, are half the deviances of these
        distributions, with a log-link, as in scikit-learn: predictions are above 0.
    quantile : float or list of float, default=0.5
        With ``loss="quantile"`` what is asked for; several, in rising order, share each head and
        never cross. `predict` then gives the one nearest to the median, or the mean of the two
        that are, `predict_quantiles` all. With another loss it must be left at 0.5.
    deep_supervision : bool, default=True
        Whether the loss is the mean over the answers after each iteration [2]_, so that each of
        them means something, see `staged_predict`. False, the published choice, asks the last one
        alone to be right.
    learning_rate : float, default=5e-4
        Peak of the one-cycle schedule of AdamW.
    weight_decay : float, default=0.01
        Of AdamW.
    batch_size : int, default=32
        Texts of a training step.
    max_epochs : int or "auto", default="auto"
        Passes over the training rows, the length of the schedule. ``"auto"`` is 10, or as many as
        make 200 steps of a small set. A row that is repeated counts once.
    early_stopping : bool, default=True
        Whether a share of the rows is held out from a head, and the epoch with the lowest loss on
        them kept.
    validation_fraction : float, default=0.2
        That share of the texts, another one for each of the estimators; equal texts are held out
        together.
    n_estimators : int or "auto", default="auto"
        RELISH heads that are fitted, each with other rows held out, and averaged. ``"auto"`` is 5
        up to 1,000 rows and 3 beyond, where a row that is repeated counts once; 1 is the published
        choice, and the fastest.
    linear_path : bool or "auto", default="auto"
        Whether ridge models on the mean and the last token state are added, weighted together with
        the heads by their errors on held-out rows: where there is little to learn from, or much
        noise, they make most of the prediction. They need a loss that asks for a mean, ``"huber"``
        or ``"squared_error"``: ``"auto"`` adds them with these, and True refuses the others.
        Without held-out rows, or with fewer than 10, there are none.
    n_iter_no_change : int, default=None
        Training stops after that many epochs without a lower validation loss. None lets the
        schedule run to its end, where the learning rate falls and most is gained.
    memory : str, path, joblib.Memory or StateStore, default=None
        Where token states are kept; a text whose states are there is not read again. A folder
        serves other processes and later days. None: this process, up to 2 GiB, and beyond that
        a temporary folder that goes with it. States of texts that are only predicted are in no
        file. A :class:`StateStore` says more: bounds, what is
        held, how to clear it.
    device : str or torch.device, default=None
        Where the language model and the head run. None: ``"cuda"`` where there is one, else
        ``"mps"``, else ``"cpu"``; where `model` is a :class:`FrozenLLM`, its device.
    dtype : {"auto", "float32", "bfloat16", "float16"} or torch.dtype, default="auto"
        Of the language model and the kept states. ``"auto"`` is bfloat16 where the hardware
        computes in it, else float32.
    model_kwargs : dict, default=None
        Passed to `from_pretrained`: ``revision``, ``device_map``, ``quantization_config``, ...;
        see :class:`FrozenLLM`.
    random_state : int, RandomState instance or None, default=None
        Draws the held-out rows, the heads' initial weights, the order of the texts and the rows
        on which layers are compared. With an int, a fit on a CPU, on the same token states, is the
        same to the last bit. None draws from the operating system: NumPy's global random state is
        neither used nor changed.
    verbose : int, default=0
        Above 0, bars show the texts read and the epochs.
    warm_start : bool, default=False
        Whether `fit` goes on from the heads of the fit before, in its units of the target, at its
        layer and with its columns, instead of from fresh weights. The linear path stays as it is,
        and there are no intervals: the heads may have seen the rows that are held out now.

    Attributes
    ----------
    head_ : RelishEnsemble
        The fitted network, on the CPU, answering in standardized units: ``head_.heads`` are the
        RELISH heads, ``head_.linear`` is the linear path or None.
    validation_score_ : float or None
        R² of what was foretold of the held-out rows by heads and ridges that had not seen them.
        None without held-out rows, after a warm start, and after `partial_fit`.
    layer_ : int
        The layer that was read, from 1.
    layer_scores_ : dict of int to float, or None
        With ``layer="auto"``, for each layer that was compared the share of the targets' variance
        that ridges foretold on the sampled rows, each from the others. None where the layer was
        given, or the rows too few to compare.
    n_outputs_ : int
        Numbers predicted for a text.
    n_features_in_ : int
        Columns of `X`, 1 for texts in one dimension.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, if `X` was a frame whose column names are all strings.
    history_ : list of dict
        An entry an epoch: ``estimator``, counted from 0, ``epoch``, ``learning_rate``,
        ``train_loss`` and, with early stopping, ``validation_loss`` and ``validation_r2``; losses
        in standardized units.
    n_epochs_ : int
        Epochs trained, of all estimators together.
    best_epoch_ : list of int
        For each estimator the epoch whose weights it has.

    See Also
    --------
    LLMEncoder : The same states, pooled, for any other regressor.
    StateStore : Where the states are kept.

    Notes
    -----
    A pickle holds the heads and the model's name, not the language model, and opens where there is
    no GPU; `save_pretrained` keeps the same without a pickle.

    On a CPU the token states of a text are the same to the last bit in any batch. The heads compute
    in float64, whose last bits depend on the batch; predictions are rounded to 24 bits, which hides
    that in all but rare cases. On other devices a prediction depends on its batch by the rounding
    of the dtype.

    With `GridSearchCV` and its like, no fold, candidate or refit of a process reads a text a second
    time, as long as the states of a fold that is predicted fit a quarter of the store's
    `max_memory`; beyond that they are read once more for the fit. With `n_jobs`, give a folder as
    `memory`: of what several processes lack for a fit, each then reads a part, and where all has
    been read none loads the language model.

    References
    ----------
    .. [1] Su and Lease, "RELISH: REgression with a Latent Iterative State Head", arXiv 2604.01206.
    .. [2] Lee et al., "Deeply-Supervised Nets", arXiv 1409.5185.

    Examples
    --------
    >>> from sklearn_relish import RelishRegressor
    >>> regressor = RelishRegressor("HuggingFaceTB/SmolLM2-135M", random_state=0)
    >>> regressor.fit(["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20)  # doctest: +SKIP
    RelishRegressor(random_state=0)
    >>> regressor.predict(["wonderful", "bad"]).shape  # doctest: +SKIP
    (2,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **LLMReader._parameter_constraints,
        "layer": [*LLMReader._parameter_constraints["layer"], StrOptions({"auto"})],
        "latent_size": [Interval(Integral, 1, None, closed="left")],
        "n_iterations": [Interval(Integral, 1, None, closed="left")],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "share_weights": ["boolean"],
        "loss": [StrOptions(set(LOSSES))],
        "quantile": [Interval(Real, 0, 1, closed="neither"), list, tuple, np.ndarray],
        "deep_supervision": ["boolean"],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_estimators": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "linear_path": ["boolean", StrOptions({"auto"})],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), None],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
    }

    def __init__(
        self,
        model: str | os.PathLike[str] | FrozenLLM = "HuggingFaceTB/SmolLM2-135M",
        *,
        layer: int | float | str = 0.6,
        state_norm: str | None = "rms",
        prompt: str | None = None,
        chat_template: bool = False,
        max_length: int = 512,
        long_text: str = "truncate",
        latent_size: int = 256,
        n_iterations: int = 3,
        n_heads: int = 8,
        share_weights: bool = False,
        loss: str = "huber",
        quantile: float | Sequence[float] = 0.5,
        deep_supervision: bool = True,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        batch_size: int = 32,
        max_epochs: int | str = "auto",
        early_stopping: bool = True,
        validation_fraction: float = 0.2,
        n_estimators: int | str = "auto",
        linear_path: bool | str = "auto",
        n_iter_no_change: int | None = None,
        memory: str | os.PathLike[str] | joblib.Memory | StateStore | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        model_kwargs: dict[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
        warm_start: bool = False,
    ) -> None:
        self.model = model
        self.layer = layer
        self.state_norm = state_norm
        self.prompt = prompt
        self.chat_template = chat_template
        self.max_length = max_length
        self.long_text = long_text
        self.latent_size = latent_size
        self.n_iterations = n_iterations
        self.n_heads = n_heads
        self.share_weights = share_weights
        self.loss = loss
        self.quantile = quantile
        self.deep_supervision = deep_supervision
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_estimators = n_estimators
        self.linear_path = linear_path
        self.n_iter_no_change = n_iter_no_change
        self.memory = memory
        self.device = device
        self.dtype = dtype
        self.model_kwargs = model_kwargs
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RelishRegressor:
        """Fit the head on the token states of texts.

        The order of the rows has no influence. While it runs in one thread, others may predict:
        each prediction is that of the fit before or of this one.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            Texts; or rows of several columns, rendered to texts by `prompt`.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            The numbers to predict.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. A row of weight 0 is as good as absent, and one of weight 2 as
            good as given twice, to the last bit. None: equal weights.

        Returns
        -------
        self : RelishRegressor

        Raises
        ------
        ValueError, TypeError
            If the input is not as described; the message names the rows. Nothing has been read
            by then.
        OSError
            If the model is not found.

        Warns
        -----
        UserWarning
            If a target is constant; if texts were cut at `max_length`; if kept states were damaged
            and are read again, or could not be written.
        """
        fitted = self._snapshot()  # a fit that is refused or interrupted leaves the earlier one
        fitted._fit(X, y, sample_weight)
        self._become(fitted)
        return self

    def _fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None) -> None:
        continuing = self.warm_start and hasattr(self, "head_")
        rows = self._check_rows(X, y, sample_weight, continuing)
        n_estimators = self._n_estimators(len(rows.texts), continuing)
        text = rows.groups
        random = self._random()
        held_out = self._held_out(text, n_estimators, random)
        if not continuing:
            self.layer_, self.layer_scores_ = self._find_layer(rows, random)
        states = self._states(rows.texts, self.layer_)
        heads = list(self.head_.heads) if continuing else []
        sizes = self._head_sizes(states.hidden_size, rows.targets.shape[1], rows.loss_fn)

        def make_head(number: int, seed: int) -> RelishHead:
            return copy.deepcopy(heads[number]) if heads else new_head(seed, **sizes)

        max_epochs = self.max_epochs
        if max_epochs == "auto":
            max_epochs = auto_epochs(len(text) - len(held_out[0]), self.batch_size)
        ensemble, trainings, oof_predictions = fit_ensemble(
            Examples.of(states, rows.targets, rows.weight),
            text,
            held_out,
            make_head=make_head,
            linear_path=bool(self.linear_path) and not continuing,
            random=random,
            max_epochs=max_epochs,
            n_iter_no_change=self.n_iter_no_change,
            **self._training(rows.loss_fn),
        )
        if continuing:  # rows that a head has seen before tell nothing of what it is worth
            ensemble = RelishEnsemble.with_heads(self.head_, ensemble.heads, rows.loss_fn)
            oof_predictions = np.full_like(oof_predictions, np.nan)
        self.head_ = ensemble
        self._learned_from(rows)
        self.history_ = [
            {"estimator": number, **epoch}
            for number, training in enumerate(trainings)
            for epoch in training.history
        ]
        self.best_epoch_ = [training.best_epoch for training in trainings]
        self.n_epochs_ = len(self.history_)
        self.validation_score_, self._conformal = None, None
        seen = np.isfinite(oof_predictions[:, 0])
        if seen.any():
            told, targets, weight = oof_predictions[seen], rows.targets[seen], rows.weight[seen]
            self._conformal = Conformal.of(rows.loss_fn, told, targets, weight)
            point = rows.loss_fn.point_prediction(told)
            varied = rows.scale > 0
            if len(point) > 1 and varied.any():
                self.validation_score_ = r2_score(
                    targets[:, varied], point[:, varied], sample_weight=weight
                )

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RelishRegressor:
        """Train the heads further on a piece of data, all of it, at a constant learning rate.

        `max_epochs` passes are made over the piece, 10 of them if it is ``"auto"``. The first
        piece decides on the target's units, the layer and the columns, and has no linear path;
        after a `fit`, its linear path stays as it is. Nothing is held out, so there are no
        intervals until the next `fit`.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.

        Returns
        -------
        self : RelishRegressor

        Raises
        ------
        ValueError, TypeError, OSError
            As `fit`; what was learned before is left as it was.
        """
        fitted = self._snapshot()
        fitted._partial_fit(X, y, sample_weight)
        self._become(fitted)
        return self

    def _partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None) -> None:
        continuing = hasattr(self, "head_")
        rows = self._check_rows(X, y, sample_weight, continuing)
        n_estimators = self._n_estimators(0, continuing)
        random = self._random()
        if not continuing:
            self.layer_, self.layer_scores_ = self._find_layer(rows, random)
        states = self._states(rows.texts, self.layer_)
        if not continuing:
            sizes = self._head_sizes(states.hidden_size, rows.targets.shape[1], rows.loss_fn)
            seeds = random.randint(np.iinfo(np.int32).max, size=n_estimators)
            heads = [new_head(int(seed), **sizes) for seed in seeds]
            self.head_ = RelishEnsemble(heads, False, rows.loss_fn).eval()
            self.history_, self.best_epoch_, self.n_epochs_ = [], [], 0
        examples = Examples.of(states, rows.targets, rows.weight)
        ensemble, history = copy.deepcopy(self.head_), []
        for number, head in enumerate(ensemble.heads):
            training = train_head(
                head,
                examples,
                None,
                max_epochs=AUTO_EPOCHS if self.max_epochs == "auto" else self.max_epochs,
                n_iter_no_change=None,
                constant_rate=True,
                seed=random.randint(np.iinfo(np.int32).max),
                **self._training(rows.loss_fn),
            )
            history += [{"estimator": number, **epoch} for epoch in training.history]
        self.head_ = RelishEnsemble.with_heads(self.head_, ensemble.heads, rows.loss_fn)
        self._learned_from(rows)
        self.history_ = self.history_ + history
        self.n_epochs_ = len(self.history_)
        self.best_epoch_ = [len(history) // len(ensemble.heads)] * len(ensemble.heads)
        self.validation_score_, self._conformal = None, None

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Numbers for texts, in the units of the `y` that was fitted.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            As in `fit`, with the same columns in the same order.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
        """
        fitted = self._snapshot()
        return fitted._point_in_units(fitted._responses(X))

    def staged_predict(self, X: ArrayLike) -> Iterator[np.ndarray]:
        """Numbers for texts after each iteration of the heads.

        The linear path, where there is one, stands beside each of them as it does beside the last.
        With ``deep_supervision=False`` no answer but the last was asked to be right.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)

        Yields
        ------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            `n_iterations` of them; the last is that of `predict`.
        """
        fitted = self._snapshot()
        stages = fitted._responses(X, staged_predict_states)  # (n, n_iterations, n_predictions)
        return map(fitted._point_in_units, stages.transpose(1, 0, 2))

    def attention(self, X: ArrayLike) -> list[TextAttention]:
        """Where the heads look: the weight of each token in each iteration.

        They are the very weights of the prediction. The linear path, which attends to nothing, has
        no part in them.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)

        Returns
        -------
        list of TextAttention
            For each text what was read, its tokens, where they stand in it, and their weights.

        Raises
        ------
        ValueError
            If the tokenizer can't tell which piece of the text a token is.
        """
        check_is_fitted(self)
        fitted = self._snapshot()
        texts = fitted._render(fitted._read_table(X, reset=False))
        tokens = fitted._llm().tokens(
            texts, max_length=fitted.max_length, windows=fitted.long_text == "window"
        )
        weights = fitted._responses(X, attention_weights)
        return [
            TextAttention(text, pieces, spans, some)
            for text, (pieces, spans), some in zip(texts, tokens, weights, strict=True)
        ]

    @available_if(lambda self: self.loss == "quantile")
    def predict_quantiles(self, X: ArrayLike) -> np.ndarray:
        """All quantiles that were asked for, with ``loss="quantile"``.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)

        Returns
        -------
        ndarray of shape (n_samples, n_quantiles) or (n_samples, n_outputs, n_quantiles)
            In the order of `quantile`, rising.
        """
        fitted = self._snapshot()
        responses = fitted._responses(X)
        return fitted._in_units(responses.reshape(len(responses), fitted.n_outputs_, -1))

    def predict_interval(self, X: ArrayLike, coverage: float = 0.9) -> np.ndarray:
        """Intervals that hold a given share of fresh targets.

        They are conformal: what was foretold of the held-out rows, by heads and ridges that had
        not seen them, tells how wide they must be. With several quantiles the outermost two are
        moved (conformalized quantile regression), and the width is each text's own; else it is
        one for all, or under the losses with a log-link a multiple of what they take for the
        standard deviation. The promise is for all texts together, drawn like those of `fit`, not
        for each kind of them.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
        coverage : float, default=0.9
            Share of the targets that are to lie inside, above 0 and below 1.

        Returns
        -------
        ndarray of shape (n_samples, 2) or (n_samples, n_outputs, 2)
            Lower and upper ends, in the units of the `y` that was fitted.

        Raises
        ------
        ValueError
            If nothing was held out, or too little for `coverage`; after a warm start and
            `partial_fit` too, as the heads may have seen any row.
        """
        check_is_fitted(self)
        if not (isinstance(coverage, Real) and 0 < coverage < 1):
            raise ValueError(f"coverage must be above 0 and below 1, got {coverage!r}.")
        fitted = self._snapshot()
        if fitted._conformal is None:
            raise ValueError(
                "Nothing was held out, which intervals stand on: fit with early_stopping=True, on"
                " more than one text."
            )
        return fitted._in_units(fitted._conformal.interval(fitted._responses(X), coverage))

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, metrics: dict[str, float] | None = None
    ) -> None:
        """Write the fitted regressor to a folder, in the Hugging Face manner.

        ``config.json`` holds the parameters, but `memory`, `device`, `verbose` and
        `random_state`; ``model.safetensors`` the weights; ``README.md`` a model card. Nothing is
        pickled, and the language model is not in it, only its name and revision.

        A regressor in the folder is replaced atomically: who opens the folder meanwhile, or
        after this process was killed, gets the old or the new one. Processes that save to one
        folder take turns.

        Parameters
        ----------
        folder : str or path
            Made where it is not there; such files in it are replaced.
        metrics : dict of str to float, default=None
            Figures for the card, beside R² on the held-out rows.

        Raises
        ------
        OSError
            If the folder can't be written.
        TypeError
            If `model_kwargs` holds what JSON can't.
        ValueError
            If a parameter is invalid, or the weights are not finite: it would not open again.
        """
        check_is_fitted(self)
        pretrained.save(self, folder, metrics)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **parameters: Any,
    ) -> RelishRegressor:
        """Open a fitted regressor that `save_pretrained` has written.

        Parameters
        ----------
        source : str or path
            A folder, or the id of a repository of the Hugging Face Hub.
        revision : str, default=None
            Branch, tag or commit of the repository.
        token : str or bool, default=None
            For a private repository.
        **parameters
            Parameters that are to be others than those that were saved: ``model`` where the
            language model lies elsewhere, ``memory``, ``device``, ...

        Returns
        -------
        RelishRegressor
            Its predictions are those of the saved one.

        Raises
        ------
        OSError
            If there is no such folder or repository, or nothing of the kind in it.
        ValueError
            If ``config.json`` is another's, is of another format, asks to run foreign code, or
            holds what can't be; or if the weights are damaged or do not fit it. All of this is
            checked before anything is allocated, and the message names the field.

        Warns
        -----
        VersionWarning
            If this package, torch, Transformers or scikit-learn had another version when the
            regressor was saved; a subclass of scikit-learn's `InconsistentVersionWarning`.
        """
        return pretrained.load(cls, source, revision, token, parameters)

    def _responses(self, X: ArrayLike, answers: Callable[..., Any] = predict_states) -> Any:
        """The ensemble's responses in standardized units, (n_samples, n_outputs * n_predictions).

        Or what another function of it and the texts' states gives, an array or a list with an entry
        a text. The states of all texts are never held at once.
        """
        check_is_fitted(self)
        texts = self._render(self._read_table(X, reset=False))
        self._check_model()
        llm = self._llm()
        rows, parts = [], []
        for piece, states in self._stream(texts, self.layer_):
            rows.append(piece)
            parts.append(answers(self.head_, states, llm.torch_device))
        order = np.concatenate(rows).argsort()
        if isinstance(parts[0], list):
            found = [entry for part in parts for entry in part]
            return [found[place] for place in order]
        return _rounded(np.concatenate(parts)[order], self.head_.loss_fn)

    def _point_in_units(self, responses: np.ndarray) -> np.ndarray:
        """One number for each output, of the target's shape."""
        point = self.head_.loss_fn.point_prediction(responses)
        return self._in_units(point[:, :, None])[..., 0]

    def _in_units(self, responses: np.ndarray) -> np.ndarray:
        """Responses, (n, n_outputs, k), in the target's units, of its shape and k."""
        responses = responses * self._y_scale[:, None] + self._y_mean[:, None]
        return responses.reshape(len(responses), *self._y_shape, -1)

    def _check_model(self) -> None:
        llm = self._llm()
        input_size = self.head_.heads[0].sizes["input_size"]
        if self.layer_ > llm.n_layers or input_size != llm.hidden_size:
            raise ValueError(
                f"The heads read {input_size} numbers for each token, at layer {self.layer_}, but"
                f" {llm!r} gives {llm.hidden_size} at layers up to {llm.n_layers}: open the"
                " regressor with the model it was fitted on, or fit again."
            )
        if llm.fingerprint != self._llm_fingerprint:
            fitted = f" (commit {self._llm_revision})" if self._llm_revision else ""
            warn(
                f"{llm!r}{f' (commit {llm.revision})' if llm.revision else ''} is not the model,"
                f" or not the revision of it{fitted}, whose states the head was fitted on: unless"
                " the weights are the same, the predictions are wrong. Fit again, or bring the"
                " fitted one back.",
            )

    def _check_rows(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, continuing: bool
    ) -> _Rows:
        """What is learned from, checked before anything is read."""
        table = self._read_table(X, reset=not continuing)
        y = self._check_y(y)
        check_consistent_length(np.empty(table.n_rows), y)
        weight = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
        check_head_sizes(self.latent_size, self.n_heads)
        loss_fn = self._loss_fn(y)
        y_shape = y.shape[1:]
        texts, groups, y, weight = _unique_pairs(self._render(table), y.reshape(len(y), -1), weight)
        if continuing:
            self._check_continuing(loss_fn, y.shape[1])
        kept = self._y_scale > 0 if continuing else np.zeros(y.shape[1], dtype=bool)
        mean, scale = _units(y, weight, loss_fn, kept)
        if kept.any():
            mean, scale = np.where(kept, self._y_mean, mean), np.where(kept, self._y_scale, scale)
        return _Rows(
            texts=texts,
            groups=groups,
            targets=_standardized(y, mean, scale, loss_fn),
            weight=weight,
            mean=mean,
            scale=scale,
            y_shape=y_shape,
            loss_fn=loss_fn,
        )

    def _loss_fn(self, y: np.ndarray) -> Loss:
        """The loss, and whether the targets are such as it is made for."""
        if self.loss == "quantile":
            quantiles = np.atleast_1d(np.asarray(self.quantile, dtype=float))
            rising = quantiles.ndim == 1 and (np.diff(quantiles) > 0).all()
            if not (rising and len(quantiles) and quantiles[0] > 0 and quantiles[-1] < 1):
                raise ValueError(
                    f"quantile={self.quantile!r} is neither a number above 0 and below 1 nor"
                    " several of them in rising order."
                )
            loss_fn = make_loss(self.loss, quantiles.tolist())
        elif isinstance(self.quantile, Real) and self.quantile == 0.5:
            loss_fn = make_loss(self.loss)
        else:
            raise ValueError(
                f"quantile={self.quantile!r} has no effect with loss={self.loss!r}: pass"
                " loss='quantile', or leave quantile at 0.5."
            )
        if self.linear_path != "auto" and self.linear_path and not loss_fn.predicts_mean:
            raise ValueError(
                "linear_path=True needs a loss that asks for a mean, 'huber' or 'squared_error',"
                f" and loss={self.loss!r} does not: pass linear_path='auto' or False."
            )
        loss_fn.check_targets(y)
        return loss_fn

    def _check_continuing(self, loss_fn: Loss, n_outputs: int) -> None:
        """Refuse to train the heads further as others than they are."""
        self._check_model()
        before, head = self.head_.loss_fn, self.head_.heads[0]
        known = head.sizes | {"n_outputs": self.n_outputs_, "log-link": before.log_link}
        known |= {"number of quantiles": before.n_predictions}
        wanted = self._head_sizes(self._llm().hidden_size, n_outputs, loss_fn)
        wanted |= {"n_outputs": n_outputs, "log-link": loss_fn.log_link}
        wanted |= {"number of quantiles": loss_fn.n_predictions}
        for name, value in known.items():
            if value != wanted[name]:
                raise ValueError(
                    f"The heads to go on with have {name}={value}, and {wanted[name]} is asked for:"
                    " keep to that, or fit anew with warm_start=False."
                )
        if self.head_.linear is not None and not loss_fn.predicts_mean:
            raise ValueError(
                f"Ridges stand beside the heads to go on with, and loss={self.loss!r} asks for"
                " something else than their mean: fit anew with warm_start=False."
            )

    def _n_estimators(self, n_rows: int, continuing: bool) -> int:
        """Heads to fit; as many as there are, to go on with them."""
        if continuing:
            n_heads = len(self.head_.heads)
            if self.n_estimators not in ("auto", n_heads):
                raise ValueError(
                    f"n_estimators={self.n_estimators}, but there are {n_heads} heads to go on"
                    " with: keep to that, or fit anew with warm_start=False."
                )
            return n_heads
        if self.n_estimators == "auto":
            return MANY if 0 < n_rows <= SMALL_SET else FEW
        return self.n_estimators

    def _head_sizes(self, input_size: int, n_outputs: int, loss_fn: Loss) -> dict[str, Any]:
        return {
            "input_size": input_size,
            "latent_size": self.latent_size,
            "n_heads": self.n_heads,
            "n_iterations": self.n_iterations,
            "n_outputs": n_outputs * loss_fn.n_predictions,
            "share_weights": self.share_weights,
            "state_norm": self.state_norm,
        }

    def _random(self) -> np.random.RandomState:
        """The source of all draws; None is a new one, so that NumPy's global one is not used."""
        if self.random_state is None:
            return np.random.RandomState()
        return check_random_state(self.random_state)

    def _training(self, loss_fn: Loss) -> dict[str, Any]:
        """What all trainings of this regressor have in common."""
        return {
            "loss_fn": loss_fn,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "deep_supervision": self.deep_supervision,
            "device": self._llm().torch_device,
            "progress": bool(self.verbose),
        }

    def _learned_from(self, rows: _Rows) -> None:
        """Remember the units, and whose states they were."""
        self.n_outputs_ = rows.targets.shape[1]
        self._y_mean, self._y_scale, self._y_shape = rows.mean, rows.scale, rows.y_shape
        self._llm_fingerprint, self._llm_revision = self._llm().fingerprint, self._llm().revision

    def _find_layer(
        self, rows: _Rows, random: np.random.RandomState
    ) -> tuple[int, dict[int, float] | None]:
        if self.layer != "auto":
            return self._llm().resolve_layer(self.layer), None
        return self._choose_layer(rows.texts, rows.groups, rows.targets, rows.weight, random)

    def _check_y(self, y: ArrayLike) -> np.ndarray:
        """Targets as float64, of one dimension or two, all finite."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        return read_targets(y)

    def _choose_layer(
        self,
        texts: list[str],
        text: np.ndarray,
        targets: np.ndarray,
        weight: np.ndarray,
        random: np.random.RandomState,
    ) -> tuple[int, dict[int, float] | None]:
        """The layer whose states tell most about a sample of the texts, and the evidence."""
        llm = self._llm()
        layers = list(dict.fromkeys(llm.resolve_layer(share) for share in SHARES))
        sample = sample_texts(text.max() + 1, random)
        if len(sample) == 0:
            return layers[0], None
        rows = np.flatnonzero(np.isin(text, sample))
        _, number = np.unique(text[rows], return_inverse=True)
        some = [texts[row] for row in rows]
        deepest = max(layers)  # the pass to it gives the states of all
        self._states(some, deepest, also=[layer for layer in layers if layer != deepest])
        examples = {
            layer: Examples.of(self._states(some, layer), targets[rows], weight[rows]).merged(
                number
            )
            for layer in layers
        }
        return choose_layer(examples, self.state_norm)

    def _held_out(
        self, text: np.ndarray, n_estimators: int, random: np.random.RandomState
    ) -> list[np.ndarray]:
        """The rows that are held out from each estimator, equal texts together.

        Where all texts are equal, they are learned from by all estimators.
        """
        n_texts, n_held_out = text.max() + 1, 0
        if self.early_stopping and n_texts > 1:
            n_held_out = math.ceil(self.validation_fraction * n_texts)
            if n_held_out == n_texts:
                raise ValueError(
                    f"validation_fraction={self.validation_fraction} of {n_texts} texts leaves none"
                    " to learn from: lower it, or pass early_stopping=False."
                )
        order = random.permutation(n_texts)
        return [
            np.flatnonzero(
                np.isin(text, order[np.arange(i * n_held_out, (i + 1) * n_held_out) % n_texts])
            )
            for i in range(n_estimators)
        ]


class TextAttention(NamedTuple):
    """Where the heads look in a text, see `RelishRegressor.attention`.

    Parameters
    ----------
    text : str
        What was read: a row rendered by the prompt, in the chat's form where there is one.
    tokens : list of str
        The pieces of the text whose states are attended to; of a special token, which is no piece
        of it, the name.
    spans : int64 ndarray of shape (n_tokens, 2)
        Where each begins and ends in the text, in characters. A special token's span is empty;
        tokens that make a character together each have all of it.
    weights : float64 ndarray of shape (n_estimators, n_iterations, n_heads, n_tokens)
        Of each token; the sum over the tokens is 1.
    """

    text: str
    tokens: list[str]
    spans: np.ndarray
    weights: np.ndarray


class _Rows(NamedTuple):
    """The distinct pairs of text and target, sorted, with the sums of their rows' weights.

    `targets`, (n, n_outputs), are in standardized units; `mean` and `scale`, (n_outputs,), lead
    back to the target's units, `y_shape` to its shape. `groups` has a number from 0 for each text,
    the same for equal ones. `weight` has a mean of 1.
    """

    texts: list[str]
    groups: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    y_shape: tuple[int, ...]
    loss_fn: Loss


def _unique_pairs(
    texts: list[str], y: np.ndarray, weight: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """The distinct pairs of text and target, sorted by both, and the sums of their weights.

    A fit on them depends neither on the order of the rows nor on whether a row is given twice or
    has twice the weight.

    Returns
    -------
    texts : list of str
    groups : int64 ndarray of shape (n_pairs,)
        A number from 0 for each text, the same for equal ones.
    y : ndarray of shape (n_pairs, n_outputs)
    weight : ndarray of shape (n_pairs,)
        With a mean of 1. Pairs whose weight is 0 in float32, the head's precision, are left out.
    """
    y = y + 0.0  # -0.0 becomes 0.0, which it equals
    weight = np.ldexp(weight, -int(np.frexp(weight.max())[1]))  # exact, and sums are finite
    order_of = {text: place for place, text in enumerate(sorted(set(texts)))}
    groups = np.array([order_of[text] for text in texts], dtype=np.int64)
    order = np.lexsort((*y.T[::-1], groups))
    texts, groups, y = [texts[row] for row in order], groups[order], y[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (groups[1:] != groups[:-1]) | (y[1:] != y[:-1]).any(axis=1)
    first = np.flatnonzero(new)
    # Sums that are rounded once depend on no order.
    weight = np.array([math.fsum(rows) for rows in np.split(weight[order], first[1:])])
    used = np.flatnonzero((weight / weight.max()).astype(np.float32))
    first, weight = first[used], weight[used]
    _, groups = np.unique(groups[first], return_inverse=True)
    return [texts[row] for row in first], groups, y[first], weight / weight.mean()


def _rounded(responses: np.ndarray, loss_fn: Loss) -> np.ndarray:
    """Responses to 24 bits, as exact as the head's weights are.

    The last bits of float64 depend on the texts that are in a batch.
    """
    mantissa, exponent = np.frexp(responses) if loss_fn.log_link else (responses, 0)
    return np.ldexp(np.round(mantissa * 2**24), exponent - 24)


def _standardized(y: np.ndarray, mean: np.ndarray, scale: np.ndarray, loss_fn: Loss) -> np.ndarray:
    """Targets in standardized units; of a constant one whatever the loss has its minimum at."""
    nothing = 1.0 if loss_fn.log_link else 0.0
    return np.where(scale > 0, (y - mean) / np.where(scale > 0, scale, 1.0), nothing)


def _units(
    y: np.ndarray, weight: np.ndarray, loss_fn: Loss, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the scale of targets: 0 and their mean under a log-link.

    A constant target has scale 0, so the head's answer falls away and the constant is left. Of
    the columns that are `kept` other units are known.
    """
    constant = np.ptp(y, axis=0) == 0
    if (constant & ~kept).any():
        columns = np.flatnonzero(constant & ~kept).tolist()
        which = f" in columns {columns}" if len(constant) > 1 else ""
        warn(f"y is constant{which}: the prediction will be that constant.")
    mean = np.where(constant, y[0], np.average(y, axis=0, weights=weight))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scale = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
    if not (np.isfinite(scale).all() and (constant | (scale > 0)).all()):
        raise ValueError(
            "y, or sample_weight, spans more than float64 can square: bring it nearer to 1 first,"
            " by a factor or a logarithm."
        )
    if loss_fn.log_link:
        mean, scale = np.where(constant, mean, 0.0), mean
    return mean, np.where(constant, 0.0, scale)
