"""`RelishRegressor`: the scikit-learn estimator.

It checks its input and calls the other packages: `inputs` for texts and targets, `states` for token
states, `training` for the fit and the predictions.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import MultiOutputMixin, RegressorMixin, _fit_context
from sklearn.callback import CallbackSupportMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead, check_head_sizes
from sklearn_relish.head.losses import LOSSES, Loss, loss_of
from sklearn_relish.hub.pretrained import PretrainedMixin
from sklearn_relish.inputs.targets import read_targets
from sklearn_relish.inputs.training_rows import TargetScaler, TrainingRows
from sklearn_relish.predictor import RelishPredictor
from sklearn_relish.preview import PreviewMixin
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.store import StateStore, open_store
from sklearn_relish.training.conformal import Conformal
from sklearn_relish.training.layer_search import SHARES, search_layer
from sklearn_relish.training.parallel import train_all
from sklearn_relish.training.splits import held_out_rows
from sklearn_relish.training.stacking import fit_ensemble
from sklearn_relish.training.summary import (
    continue_summary,
    history_of,
    summarize_heads,
    with_layers,
)
from sklearn_relish.training.trainer import AUTO_EPOCHS, Examples, auto_epochs, new_head

# n_estimators="auto": the number for up to SMALL_SET distinct rows, and for more.
SMALL_SET, SMALL_SET_ESTIMATORS, ESTIMATORS = 1_000, 5, 3


class RelishRegressor(
    PretrainedMixin,
    PreviewMixin,
    MultiOutputMixin,
    RegressorMixin,
    CallbackSupportMixin,
    RelishPredictor,
):
    r"""Regression on texts with a frozen language model and a latent iterative state head.

    The language model reads each text once, and its token states are kept (see `memory`). The
    RELISH head [1]_, a small network, is fitted on them: a learned latent state attends to the
    token states for a few iterations and is read out by a linear layer.

    Parameters
    ----------
    model : str, path or TokenStateReader, default="HuggingFaceTB/SmolLM2-135M"
        Hub id, local folder or path of a ``.gguf`` file of a language model. It is loaded once per
        process, whatever the number of estimators that name it. A :class:`FrozenLLM`, or
        another :class:`TokenStateReader`, is shared and never copied.
    layer : int, float or "auto", default=0.6
        The layer whose states are read; no higher layer is computed. An int is a layer from 1 to
        the number of layers; a negative int counts from the end. -1, the published choice, is the
        last layer after the final norm. A float in (0, 1] is a fraction of the depth. Middle layers
        describe a text better than the last one, which is tuned to predict the next token.
        ``"auto"`` compares 50, 55, 60 and 65 % of the depth on a sample of the rows and takes 60 %
        unless another one is clearly better; reading takes up to a seventh longer.
    state_norm : {"rms", None}, default="rms"
        ``"rms"`` divides each token state by its root mean square: in middle layers that of the
        first token is a hundred times larger than the others. None is the published choice.
    prompt : str or list of str, default=None
        Template of the text of a row, for example
        ``"Sentence 1: {premise}\nSentence 2: {hypothesis}"`` with the names of columns as fields;
        ``{text}`` for one-dimensional `X`; ``{x0}``, ... for arrays. None: the text itself, or
        ``column: value`` lines for several columns. Two columns of texts are compared by token.
        With a list of templates, each row is read with each of them. Heads learn from all of its
        texts, and its prediction is the mean over them. If two columns of texts are in both orders,
        heads also read how a token's state differs between the two.
    prefix : str, default=""
        Text that the model reads before each row's text: instructions, a rubric, or examples. The
        heads get no states of it. Its tokens count towards the model's context, not `max_length`.
        A causal model on a CPU reads it once.
    chat_template : bool, default=False
        Whether the text is formatted by the tokenizer's chat template, as a message of the user, up
        to the point where the model's answer begins.
    max_length : int, default=512
        Maximum number of tokens read at once, limited by the model's window.
    long_text : {"truncate", "window"}, default="truncate"
        What is done with longer texts. ``"truncate"`` cuts them and warns with their number.
        ``"window"`` reads them in windows that overlap by a quarter, and the head attends to the
        states of all tokens; this costs a third more than the same number of tokens in short texts.
    latent_size : int, default=128
        Size of the latent state; a multiple of `n_heads`.
    n_iterations : int, default=3
        Number of refinements of the latent state.
    n_heads : int, default=8
        Number of attention heads.
    share_weights : bool, default=False
        Whether all iterations share the weights of one block.
    loss : str, default="huber"
        Loss on the standardized target. ``"huber"`` is squared up to one standard deviation and
        linear beyond. ``"squared_error"`` predicts the mean, ``"absolute_error"`` the median, and
        ``"quantile"`` what `quantile` says. ``"poisson"``, for counts and amounts of 0 or more, and
        ``"gamma"``, for amounts above 0, are half the deviances of these distributions with a log
        link, as in scikit-learn; their predictions are positive.
    quantile : float or list of float, default=0.5
        With ``loss="quantile"``, the quantiles to predict, in increasing order. Several quantiles
        share each head and never cross. `predict` returns the quantile nearest to the median, or
        the mean of the two nearest ones; `predict_quantiles` returns all. With other losses it must
        be 0.5.
    deep_supervision : bool, default=True
        Whether the loss is the mean over the predictions after each iteration [2]_, so that each of
        them is trained, see `staged_predict`. False, the published choice, trains the last one
        alone.
    learning_rate : float or "auto", default="auto"
        Peak of the one-cycle schedule of AdamW. ``"auto"`` is 2e-3, times the square root of
        576 / hidden size for models with a hidden size above 576. `partial_fit` has a constant
        rate, with ``"auto"`` a quarter of that.
    weight_decay : float, default=0.01
        Weight decay of AdamW.
    batch_size : int, default=32
        Texts per training step.
    max_epochs : int or "auto", default="auto"
        Passes over the training rows, the length of the schedule. ``"auto"`` is 10 epochs, or more
        for a small set to reach 200 steps. Repeated rows count once.
    early_stopping : bool, default=True
        Whether each head holds out a fraction of the rows and keeps the averaged weights of the
        epoch with the lowest loss on them. Averages are over up to a fifth of all steps.
    validation_fraction : float, default=0.2
        The fraction of the texts that is held out. Each estimator holds out different texts, as far
        as there are enough; equal texts are held out together.
    n_estimators : int or "auto", default="auto"
        Number of RELISH heads; each is fitted with other rows held out, and they are averaged.
        ``"auto"`` is 5 for up to 1,000 distinct rows and 3 for more, and in `partial_fit`. 1 is the
        published choice, and the fastest.
    linear_path : bool or "auto", default="auto"
        If true, ridge models on the mean, the last and the standard deviation of the token
        states, at `layer` and at a lower one, are added, weighted together with the heads by
        out-of-fold error; for two columns of texts, two more on the means of the two texts and on
        the distances between their tokens. The mean out-of-fold error is added too, less of
        it with few rows. For small or noisy sets they make up most of the prediction. They need
        the loss ``"huber"`` or ``"squared_error"`` and 10 held-out texts. Otherwise ``"auto"``
        leaves them out; True raises an error for another loss, and warns if texts are too few.
    n_iter_no_change : int, default=None
        Stop training after this many epochs without a lower validation loss. None runs the schedule
        to its end, where the learning rate is low and most is gained.
    memory : str, path, joblib.Memory or StateStore, default=None
        Where token states are kept; a text with kept states is not read again. A folder is shared
        by processes and stays. None keeps them in this process up to 2 GiB, and beyond that in a
        temporary folder, which is removed with the process; states of texts that are only predicted
        are never in files. See :class:`StateStore` for bounds and other options.
    device : str or torch.device, default=None
        Device of the language model and the heads. None: ``"cuda"`` if available, else ``"mps"``,
        else ``"cpu"``; if `model` is a :class:`FrozenLLM`, its device.
    dtype : {"auto", "float32", "bfloat16", "float16"} or torch.dtype, default="auto"
        Dtype of the language model and the kept states. ``"auto"`` is bfloat16 if the hardware
        supports it, else float32.
    model_kwargs : dict, default=None
        Passed to `from_pretrained`: ``revision``, ``device_map``, ``quantization_config``, ...;
        see :class:`FrozenLLM`.
    random_state : int, RandomState instance or None, default=None
        Determines the held-out rows, the initial weights, the order of the texts and the rows used
        by ``layer="auto"``. With an int, a fit on a CPU on the same token states is reproducible to
        the last bit. None is random; NumPy's global random state is neither used nor changed.
    verbose : int, default=0
        If above 0, show a bar for a fit, and for predictions in several steps, after a second.
    warm_start : bool, default=False
        If True, `fit` continues with the heads of the previous fit, in the same units, at the same
        layer and with the same columns. The linear path is kept unchanged. There are no intervals
        then, because the heads may have been trained on the rows that are held out now.

    Attributes
    ----------
    head_ : RelishEnsemble
        The fitted network, on the CPU, in standardized units: ``head_.heads`` are the RELISH heads,
        ``head_.linear`` is the linear path or None.
    validation_score_ : float or None
        R² of the out-of-fold predictions of heads and ridges. None without held-out rows, after a
        warm start, and after `partial_fit`.
    layer_ : int
        The layer that the heads read, from 1.
    layer_scores_ : dict of int to float, or None
        With ``layer="auto"``, the leave-one-out R² of ridge models on the sampled rows for each
        layer compared. None if the layer was given or there are too few rows to compare.
    n_outputs_ : int
        Number of outputs.
    n_features_in_ : int
        Number of columns of `X`; 1 for one-dimensional `X`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names, if `X` is a data frame or a dict whose column names are all strings.
    history_ : list of dict
        One entry per epoch: ``estimator``, from 0, ``epoch``, ``learning_rate``, ``train_loss``
        and, with early stopping, ``validation_loss`` and ``validation_r2`` of the averaged weights;
        losses are in standardized units.
    n_epochs_ : int
        Total number of epochs over all estimators.
    best_epoch_ : list of int
        For each estimator, the epoch whose weights it has.
    ensemble_summary_ : list of dict
        What each head and each ridge of the last `fit` contributes: ``part`` (``"head 1"``,
        ``"ridge mean"``, ...), ``layer``, ``best_epoch``; ``n_rows`` and ``n_held_out``, how many
        different rows it was fitted and scored on; ``validation_r2``, R² on the latter; ``weight``,
        its factor; ``contribution``, its fraction of the prediction's size without the mean. With
        several outputs, the last three are means over them.

    See Also
    --------
    LLMEncoder : The same states, pooled, for any other regressor.
    StateStore : Where the states are kept.

    Notes
    -----
    A pickle holds the heads and the name of the model, not the language model, and can be loaded
    without a GPU. `save_pretrained` saves the same without pickle.

    On a CPU, the token states of a text are the same to the last bit in any batch. The heads
    compute in float64, whose last bits depend on the batch; predictions are rounded to 24 bits,
    which hides the difference in all but rare cases. On other devices a prediction depends on its
    batch by the rounding of the dtype.

    In `GridSearchCV` and similar searches, a process reads no text twice, as long as the states of
    a predicted fold fit in a quarter of the store's `max_memory`; otherwise they are read once more
    for the fit. With `n_jobs`, pass a folder as `memory`: processes then share the reading of the
    texts needed for fits.

    References
    ----------
    .. [1] Su and Lease, "LLM REgression with a Latent Iterative State Head", arXiv 2604.01206.
    .. [2] Lee et al., "Deeply-Supervised Nets", arXiv 1409.5185.

    Examples
    --------
    >>> from sklearn_relish import RelishRegressor
    >>> regressor = RelishRegressor("HuggingFaceTB/SmolLM2-135M", random_state=0)
    >>> regressor.fit(["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20)
    RelishRegressor(random_state=0)
    >>> regressor.predict(["wonderful", "bad"]).shape
    (2,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **RelishPredictor._parameter_constraints,
        "prompt": [str, list, tuple, None],
        "layer": [*RelishPredictor._parameter_constraints["layer"], StrOptions({"auto"})],
        "latent_size": [Interval(Integral, 1, None, closed="left")],
        "n_iterations": [Interval(Integral, 1, None, closed="left")],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "share_weights": ["boolean"],
        "loss": [StrOptions(set(LOSSES))],
        "quantile": [Interval(Real, 0, 1, closed="neither"), list, tuple, np.ndarray],
        "deep_supervision": ["boolean"],
        "learning_rate": [Interval(Real, 0, None, closed="neither"), StrOptions({"auto"})],
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
        model: str | os.PathLike[str] | TokenStateReader = "HuggingFaceTB/SmolLM2-135M",
        *,
        layer: int | float | str = 0.6,
        state_norm: str | None = "rms",
        prompt: str | Sequence[str] | None = None,
        prefix: str = "",
        chat_template: bool = False,
        max_length: int = 512,
        long_text: str = "truncate",
        latent_size: int = 128,
        n_iterations: int = 3,
        n_heads: int = 8,
        share_weights: bool = False,
        loss: str = "huber",
        quantile: float | Sequence[float] = 0.5,
        deep_supervision: bool = True,
        learning_rate: float | str = "auto",
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
        self.prefix = prefix
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
        """Fit heads and ridges on the token states of texts.

        The order of the rows does not matter. Other threads may predict during a fit: each
        prediction uses either the previous or the new fit.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            Texts; or rows of several columns, rendered to texts by `prompt`: a frame, an array, or
            a dict with a list of cells for each column.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. A weight of 0 equals leaving the row out, and a weight of 2 equals
            repeating it, to the last bit. None: equal weights.

        Returns
        -------
        self : RelishRegressor

        Raises
        ------
        ValueError, TypeError
            If the input is not as described. The message names the rows; nothing has been read.
        FloatingPointError
            If token states are not finite, or if a training diverges.
        OSError
            If the model is not found.

        Warns
        -----
        UserWarning
            If a target is constant; if texts were cut at `max_length`; if kept states were damaged
            and are read again, or could not be written.

        Examples
        --------
        A table, with weights of its rows:

        >>> from sklearn_relish import RelishRegressor
        >>> films = {"title": ["Alien", "Babe"] * 20, "year": [1979, 1995] * 20}
        >>> regressor = RelishRegressor(random_state=0)
        >>> regressor = regressor.fit(films, [97, 83] * 20, sample_weight=[2, 1] * 20)
        >>> regressor.predict({"title": ["Heat"], "year": [1995]}).shape
        (1,)
        """
        data = {"estimator": self, "X": X, "y": y, "metadata": {"sample_weight": sample_weight}}
        context = self._init_callback_context()
        context.call_on_fit_task_begin(**data)
        fitted = self._snapshot()  # a refused or interrupted fit leaves the previous one unchanged
        with torch.inference_mode(False):  # the caller may have disabled gradients
            fitted._fit(X, y, sample_weight)
        self._update_from(fitted)
        context.call_on_fit_task_end(**data, reconstruction_attributes={})
        return self

    def _fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None) -> None:
        continuing = self.warm_start and hasattr(self, "head_")
        rows, targets, loss_fn = self._check_rows(X, y, sample_weight, continuing)
        n_heads = self._n_estimators(len(rows.texts), continuing)
        n_texts = len(self._views()) * rows.n_texts
        with self._fit_progress(n_texts, n_heads=n_heads, head_options=self._head_options()):
            self._fit_rows(rows, targets, loss_fn, n_heads, continuing)

    def _fit_rows(
        self, rows: TrainingRows, targets: np.ndarray, loss_fn: Loss, n_heads: int, continuing: bool
    ) -> None:
        random = self._random()
        fraction = self.validation_fraction if self.early_stopping else 0.0
        components = rows.components()
        held_out = held_out_rows(components, fraction, n_heads, random)
        if not continuing:
            self.layer_, self.layer_scores_ = self._find_layer(rows, targets, random)
        states, *views = self._states_of_views(rows, self.layer_)
        sizes = self._head_sizes(states.hidden_size, targets.shape[1], loss_fn)

        def make_head(number: int, seed: int) -> RelishHead:
            if continuing:
                return copy.deepcopy(self.head_.heads[number])
            return new_head(seed, **states.head_options, **sizes)

        max_epochs = self.max_epochs
        if max_epochs == "auto":
            n_trained = (1 + len(views)) * (len(rows.groups) - len(held_out[0]))
            max_epochs = auto_epochs(n_trained, self.batch_size)
        ensemble, trainings, oof_predictions, summary = fit_ensemble(
            Examples.of(states, targets, rows.weight),
            rows.groups,
            held_out,
            make_head=make_head,
            linear_path=False if continuing else self.linear_path,
            random=random,
            views=views,
            components=components,
            max_epochs=max_epochs,
            progress=bool(self.verbose),
            n_iter_no_change=self.n_iter_no_change,
            **self._training_options(loss_fn),
        )
        if continuing:  # the heads may have been trained on the rows that are held out now
            ensemble = self.head_.with_heads(ensemble.heads, loss_fn)
            oof_predictions = np.full_like(oof_predictions, np.nan)
            summary = continue_summary(self.ensemble_summary_, summary)
        self._set_fitted(ensemble, history_of(trainings), summary)
        self._set_out_of_fold(oof_predictions, targets, rows.weight, loss_fn)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RelishRegressor:
        """Continue training of the heads on a batch of rows, at a constant learning rate.

        It makes `max_epochs` passes over the batch, 10 if it is ``"auto"``, and averages weights
        over the last fifth. The first batch determines the units of the target, the layer and the
        columns, and there is no linear path; after a `fit`, its linear path is kept unchanged.
        Nothing is held out, so there are no intervals until the next `fit`.

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
            As `fit`; the previous fit is left unchanged.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> regressor = RelishRegressor(max_epochs=2, random_state=0)
        >>> for texts, y in [(["dull", "fine"], [1, 3]), (["poor", "splendid"], [2, 5])]:
        ...     regressor = regressor.partial_fit(texts, y)
        """
        fitted = self._snapshot()
        with torch.inference_mode(False):
            fitted._partial_fit(X, y, sample_weight)
        self._update_from(fitted)
        return self

    def _partial_fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None) -> None:
        continuing = hasattr(self, "head_")
        rows, targets, loss_fn = self._check_rows(X, y, sample_weight, continuing)
        n_heads = self._n_estimators(None, continuing)
        n_texts = len(self._views()) * rows.n_texts
        known = {"n_heads": n_heads, "head_options": self._head_options()}
        with self._fit_progress(n_texts, is_partial=True, **known):
            self._partial_fit_rows(rows, targets, loss_fn, n_heads, continuing)

    def _partial_fit_rows(
        self, rows: TrainingRows, targets: np.ndarray, loss_fn: Loss, n_heads: int, continuing: bool
    ) -> None:
        random = self._random()
        if not continuing:
            self.layer_, self.layer_scores_ = self._find_layer(rows, targets, random)
        states, *views = self._states_of_views(rows, self.layer_)
        if continuing:
            heads, history = list(copy.deepcopy(self.head_.heads)), list(self.history_)
        else:
            sizes = self._head_sizes(states.hidden_size, targets.shape[1], loss_fn)
            sizes |= states.head_options
            seeds = random.randint(np.iinfo(np.int32).max, size=n_heads)
            heads, history = [new_head(int(seed), **sizes) for seed in seeds], []
        n_epochs = AUTO_EPOCHS if self.max_epochs == "auto" else int(self.max_epochs)
        examples = Examples.of(states, targets, rows.weight)
        seeds = random.randint(np.iinfo(np.int32).max, size=len(heads)).tolist()
        trainings = train_all(
            heads,
            [(examples.with_views(views), None)] * len(heads),
            seeds,
            max_epochs=n_epochs,
            n_iter_no_change=None,
            constant_rate=True,
            progress=bool(self.verbose),
            **self._training_options(loss_fn),
        )
        history += history_of(trainings)
        all_rows, none = np.arange(len(targets)), np.arange(0)
        summary = summarize_heads(examples, [(all_rows, none)] * len(heads), trainings, loss_fn)
        if continuing:
            ensemble = self.head_.with_heads(heads, loss_fn)
            summary = continue_summary(self.ensemble_summary_, summary)
        else:
            n_views = 1 + len(views)
            ensemble = RelishEnsemble(heads, False, loss_fn, n_views=n_views).eval()
        self._set_fitted(ensemble, history, summary)

    def _check_rows(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        continuing: bool,
        parts_of: Callable[[np.ndarray], np.ndarray | None] = lambda y: None,
    ) -> tuple[TrainingRows, np.ndarray, Loss]:
        """Check the input before anything is read; set the units of the target.

        `parts_of` returns the parts of the rows that are not merged, given all targets.

        Returns
        -------
        rows : TrainingRows
        targets : ndarray of shape (n_pairs, n_outputs)
            In standardized units.
        loss_fn : Loss
        """
        table = self._read_table(X, reset=not continuing)
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        y = read_targets(y)
        check_consistent_length(np.empty(table.n_rows), y)
        weight = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
        check_head_sizes(self.latent_size, self.n_heads)
        loss_fn = self._loss_fn(y)
        parts = parts_of(y)
        texts = self._texts_of_rows(table)
        rows = TrainingRows.from_rows(texts, y.reshape(len(y), -1), weight, parts)
        n_outputs = rows.y.shape[1]
        if continuing:
            self._check_continuing(loss_fn, n_outputs)
        fixed = self._y_scale > 0 if continuing else np.zeros(n_outputs, dtype=bool)
        scaler = TargetScaler.fit(rows.y, rows.weight, log_link=loss_fn.log_link, fixed=fixed)
        if fixed.any():
            scaler = scaler._replace(
                mean=np.where(fixed, self._y_mean, scaler.mean),
                scale=np.where(fixed, self._y_scale, scaler.scale),
            )
        self.n_outputs_, self._y_shape = n_outputs, y.shape[1:]
        self._y_mean, self._y_scale = scaler.mean, scaler.scale
        return rows, scaler.standardize(rows.y), loss_fn

    def _loss_fn(self, y: np.ndarray) -> Loss:
        """Make the loss; raise an error if its parameters or the targets are not valid."""
        loss_fn = loss_of(self.loss, self.quantile, self.linear_path)
        loss_fn.check_targets(y)
        return loss_fn

    def _check_continuing(self, loss_fn: Loss, n_outputs: int) -> None:
        """Raise an error if the fitted heads do not fit the parameters or the targets."""
        self._fitted_views()
        self._check_model()
        fitted = self.head_.heads[0].sizes | {
            "n_outputs": self.n_outputs_,
            "log link of the loss": self.head_.loss_fn.log_link,
            "number of quantiles": self.head_.loss_fn.n_predictions,
        }
        requested = fitted | self._head_sizes(self._llm().hidden_size, n_outputs, loss_fn)
        requested |= {
            "n_outputs": n_outputs,
            "log link of the loss": loss_fn.log_link,
            "number of quantiles": loss_fn.n_predictions,
        }
        for name, value in fitted.items():
            if value != requested[name]:
                raise ValueError(
                    f"The fitted heads have {name}={value}, but {requested[name]} was requested:"
                    " keep the parameters, or fit again with warm_start=False."
                )
        if self.head_.linear is not None and not loss_fn.allows_linear_path:
            raise ValueError(
                f"The fitted ridges can't be used with loss={self.loss!r}: keep the loss, or fit"
                " again with warm_start=False."
            )

    def _n_estimators(self, n_rows: int | None, continuing: bool) -> int:
        """Number of heads to fit, or all fitted ones; None rows: of a `partial_fit`."""
        if continuing:
            n_fitted = len(self.head_.heads)
            if self.n_estimators not in ("auto", n_fitted):
                raise ValueError(
                    f"n_estimators={self.n_estimators}, but {n_fitted} heads are fitted: keep the"
                    " number, or fit again with warm_start=False."
                )
            return n_fitted
        if self.n_estimators == "auto":
            is_small = n_rows is not None and n_rows <= SMALL_SET
            return SMALL_SET_ESTIMATORS if is_small else ESTIMATORS
        return int(self.n_estimators)

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
        """The source of all random numbers; never NumPy's global one."""
        if self.random_state is None:
            return np.random.RandomState()
        return check_random_state(self.random_state)

    def _training_options(self, loss_fn: Loss) -> dict[str, Any]:
        """The arguments that all calls of `train_head` share."""
        return {
            "loss_fn": loss_fn,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "deep_supervision": self.deep_supervision,
            "device": self._llm().torch_device,
            "max_memory": open_store(self.memory).max_memory,
        }

    def _set_fitted(
        self, ensemble: RelishEnsemble, history: list[dict[str, Any]], summary: list[dict[str, Any]]
    ) -> None:
        """Set the fitted attributes, without out-of-fold predictions."""
        self.head_, self.history_, self.n_epochs_ = ensemble, history, len(history)
        self.ensemble_summary_ = with_layers(summary, self.layer_)
        self.best_epoch_ = [row["best_epoch"] for row in summary[: len(ensemble.heads)]]
        self._llm_fingerprint, self._llm_revision = self._llm().fingerprint, self._llm().revision
        self._fitted_templates = self._templates()
        self.validation_score_, self._conformal = None, None

    def _set_out_of_fold(
        self, predictions: np.ndarray, targets: np.ndarray, weight: np.ndarray, loss_fn: Loss
    ) -> None:
        """Set what follows from the out-of-fold predictions, which are NaN where there are none."""
        is_held_out = np.isfinite(predictions[:, 0])
        if not is_held_out.any():
            return
        predictions, targets = predictions[is_held_out], targets[is_held_out]
        weight = weight[is_held_out]
        self._conformal = Conformal.of(loss_fn, predictions, targets, weight)
        point = loss_fn.point_prediction(predictions)
        varies = self._y_scale > 0
        if len(point) > 1 and varies.any():
            self.validation_score_ = r2_score(
                targets[:, varies], point[:, varies], sample_weight=weight
            )

    def _find_layer(
        self, rows: TrainingRows, targets: np.ndarray, random: np.random.RandomState
    ) -> tuple[int, dict[int, float] | None]:
        """The layer to read, and with ``"auto"`` the score of each candidate."""
        llm = self._llm()
        if not isinstance(self.layer, str):
            return llm.resolve_layer(self.layer), None
        layers = list(dict.fromkeys(llm.resolve_layer(fraction) for fraction in SHARES))
        first = self._views()[0]
        data = rows.texts_of_view(0), rows.groups, targets, rows.weight, first._states
        return search_layer(layers, *data, self.state_norm, random)
