"""`RelishRegressorCV`: a `RelishRegressor` that chooses parameters by cross-validation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import suppress
from inspect import signature
from numbers import Integral
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin, _fit_context
from sklearn.callback import CallbackSupportMixin
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.model_selection import BaseCrossValidator, ParameterGrid, check_cv
from sklearn.utils import check_consistent_length
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import _check_sample_weight

from sklearn_relish.head.head import RelishHead, check_head_sizes
from sklearn_relish.head.losses import Loss
from sklearn_relish.hub.pretrained import SavingMixin
from sklearn_relish.inputs.targets import read_groups
from sklearn_relish.inputs.training_rows import TrainingRows
from sklearn_relish.preview import PreviewMixin
from sklearn_relish.regressor import RelishRegressor
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.store import StateStore
from sklearn_relish.training.estimate import Plan
from sklearn_relish.training.search import (
    TRAINING,
    Candidate,
    SearchResult,
    TrainedHead,
    number_of_trainings,
    search_heads,
    shared_trainings,
)
from sklearn_relish.training.stacking import Fold, combine, fit_linear_path, with_ridges
from sklearn_relish.training.summary import history_of
from sklearn_relish.training.trainer import Examples

SIZES = ("state_norm", "latent_size", "n_iterations", "n_heads", "share_weights")
SEARCHED = SIZES + TRAINING
FOLDS = 5
_constraints = RelishRegressor._parameter_constraints


class RelishRegressorCV(
    PreviewMixin, MultiOutputMixin, RegressorMixin, CallbackSupportMixin, SavingMixin
):
    r"""`RelishRegressor` with built-in cross-validation of the parameters of head and training.

    Each combination of the listed values is a candidate. For each fold, a head of the candidate is
    trained on the other folds. Its predictions for the fold, weighted with those of the ridges,
    give the score, and the heads of the best candidate are the ensemble: nothing is trained again
    after the search.

    Two things make this cheaper than `GridSearchCV`. After each fold, the worse half of the
    trainings is dropped (successive halving [1]_). And with `deep_supervision`, candidates that
    differ in `n_iterations` alone share a training.

    Parameters
    ----------
    model, layer, prompt, prefix, chat_template, max_length, long_text
        As in `RelishRegressor`, but `prompt` is a single template. ``layer="auto"`` chooses a layer
        before the search, from a sample of all rows.
    state_norm : {"rms", None} or list, default="rms"
        As in `RelishRegressor`. This and all other parameters that can be lists can also be tuples
        or arrays.
    latent_size : int or list of int, default=(64, 128, 256)
        Size of the latent state.
    n_iterations : int or list of int, default=(1, 2, 3)
        Number of refinements of the latent state.
    n_heads : int or list of int, default=8
        Number of attention heads.
    share_weights : bool or list of bool, default=False
        Whether all iterations share the weights of one block.
    loss, quantile
        As in `RelishRegressor`.
    deep_supervision : bool or list of bool, default=True
        Whether the prediction after each iteration is trained. If not, candidates that differ in
        `n_iterations` are trained separately.
    learning_rate : float or "auto", or a list of them, default="auto"
        Peak of the one-cycle schedule of AdamW.
    weight_decay : float or list of float, default=0.01
        Weight decay of AdamW.
    batch_size : int or list of int, default=32
        Texts per training step.
    max_epochs : int or "auto", or a list of them, default="auto"
        Passes over the training rows, the length of the schedule.
    linear_path, n_iter_no_change
        As in `RelishRegressor`. The ridges are fitted once, before the heads. With groups or a
        splitter their weight follows from the same folds; there are none if each text has rows in
        both parts of every fold.
    cv : int, splitter or iterable, default=None
        The folds. An int is a number of random folds, in which equal texts are together, or the
        rows of each group if `fit` gets groups. None is 5. A splitter of scikit-learn or an
        iterable of (train, test) row numbers is used as it is. A splitter gets `y` and the groups,
        but no texts.
    scoring : str or callable, default=None
        A name or scorer as in `GridSearchCV`. None is R²; for quantiles, a pinball loss is a better
        choice. It scores the prediction of a single head for each fold, weighted with the ridges if
        there are any, so scores have a larger random error than the final ensemble. A callable
        gets an object whose `predict` returns these predictions, and can't use the texts. With
        `sample_weight`, scores are weighted if the metric has this parameter.
    memory, device, dtype, model_kwargs
        As in `RelishRegressor`.
    random_state : int, RandomState instance or None, default=None
        Determines the folds, the initial weights and the order of the texts. All candidates of a
        fold have the same.
    verbose : int, default=0
        If above 0, show a bar for a fit, and for predictions in several steps, after a second.

    Attributes
    ----------
    best_params_ : dict
        The values of the best candidate for the parameters that are lists.
    best_score_ : float
        Its mean score on the folds, each of a single head with the ridges.
    best_index_ : int
        Its row in `cv_results_`. Of several candidates with the same score, the first.
    best_estimator_ : RelishRegressor
        A fitted regressor with the parameters of the best candidate and the same predictions, for
        example to continue with `partial_fit`.
    cv_results_ : dict of ndarray
        As in `GridSearchCV`, without the times of scoring: ``params``, ``param_...``,
        ``split0_test_score`` and so on, ``mean_test_score``, ``std_test_score``,
        ``rank_test_score``, ``mean_fit_time`` and ``std_fit_time``. ``n_folds`` is the number of
        folds that the candidate was trained on; means are over these, and candidates with more
        folds have better ranks. The times are the seconds of training a head; candidates that share
        a training have the same.
    n_splits_ : int
        Number of folds.
    head_ : RelishEnsemble
        The heads of the best candidate, one for each fold, with the linear path.
    validation_score_ : float or None
        R² of the out-of-fold predictions of heads and ridges.
    layer_, layer_scores_, n_outputs_, n_features_in_, feature_names_in_
        As in `RelishRegressor`.
    history_, n_epochs_, best_epoch_, ensemble_summary_
        As in `RelishRegressor`, of the heads of the best candidate.

    See Also
    --------
    RelishRegressor : Without a search. It can be searched by `GridSearchCV`, which trains the heads
        of every candidate on every fold, and again after the search.

    Notes
    -----
    To score a head, the rows of its fold are split into two halves. The epoch for each half is the
    one with the lowest loss on the other half.

    An interrupted `fit` can be continued in the same process: call it again on the same estimator
    with the same data and parameters. Heads that were trained to the end are not trained again, if
    `cv` gives the same folds. (A generator has no folds left.)

    References
    ----------
    .. [1] Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
       Optimization", AISTATS 2016.

    Examples
    --------
    >>> from sklearn_relish import RelishRegressorCV
    >>> search = RelishRegressorCV(n_iterations=[1, 3], latent_size=[128, 256], random_state=0)
    >>> texts = [f"{word} film {i}" for i in range(20) for word in ("dull", "fine", "splendid")]
    >>> search = search.fit(texts, [1, 3, 5] * 20)
    >>> sorted(search.best_params_)
    ['latent_size', 'n_iterations']
    """

    _guide_page = "searching.md"
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **{
            name: [*allowed, list, tuple, np.ndarray] if name in SEARCHED else allowed
            for name, allowed in _constraints.items()
            if name not in ("early_stopping", "validation_fraction", "n_estimators", "warm_start")
        },
        "prompt": [str, None],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
    }

    def __init__(
        self,
        model: str | os.PathLike[str] | TokenStateReader = "HuggingFaceTB/SmolLM2-135M",
        *,
        layer: int | float | str = 0.6,
        state_norm: str | Sequence[str | None] | None = "rms",
        prompt: str | None = None,
        prefix: str = "",
        chat_template: bool = False,
        max_length: int = 512,
        long_text: str = "truncate",
        latent_size: int | Sequence[int] = (64, 128, 256),
        n_iterations: int | Sequence[int] = (1, 2, 3),
        n_heads: int | Sequence[int] = 8,
        share_weights: bool | Sequence[bool] = False,
        loss: str = "huber",
        quantile: float | Sequence[float] = 0.5,
        deep_supervision: bool | Sequence[bool] = True,
        learning_rate: float | str | Sequence[float | str] = "auto",
        weight_decay: float | Sequence[float] = 0.01,
        batch_size: int | Sequence[int] = 32,
        max_epochs: int | str | Sequence[int | str] = "auto",
        linear_path: bool | str = "auto",
        n_iter_no_change: int | None = None,
        cv: int | BaseCrossValidator | Iterable[Any] | None = None,
        scoring: str | Callable[..., float] | None = None,
        memory: str | os.PathLike[str] | joblib.Memory | StateStore | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        model_kwargs: dict[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
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
        self.linear_path = linear_path
        self.n_iter_no_change = n_iter_no_change
        self.cv = cv
        self.scoring = scoring
        self.memory = memory
        self.device = device
        self.dtype = dtype
        self.model_kwargs = model_kwargs
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> RelishRegressorCV:
        """Choose the best candidate, and fit heads and ridges on the token states of texts.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            As in `RelishRegressor.fit`.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows. A weight of 0 equals leaving the row out, and a weight of 2 equals
            repeating it in the same fold. A splitter does not know the weights.
        groups : array-like of shape (n_samples,), default=None
            Rows of one group are in the same fold, if `cv` is a number or a splitter for groups.

        Returns
        -------
        self : RelishRegressorCV

        Raises
        ------
        ValueError, TypeError
            If the input or a candidate is not valid, if there are too few texts for the folds, or
            if no score is finite.
        FloatingPointError
            If the training of every candidate that was not dropped diverged.
        OSError
            If the model is not found.

        Warns
        -----
        UserWarning
            As `RelishRegressor.fit`; and if the training of a candidate diverged. This candidate is
            dropped.

        Examples
        --------
        The texts of one author are in the same fold:

        >>> from sklearn_relish import RelishRegressorCV
        >>> texts, y = [f"text {i}" for i in range(20)], range(20)
        >>> search = RelishRegressorCV(n_iterations=[1, 2], latent_size=64, cv=2, random_state=0)
        >>> search.fit(texts, y, groups=["Ada", "Bob"] * 10).n_splits_
        2
        """
        data = {
            "estimator": self,
            "X": X,
            "y": y,
            "metadata": {"sample_weight": sample_weight, "groups": groups},
        }
        context = self._init_callback_context()
        context.call_on_fit_task_begin(**data)
        fitted = self._snapshot()
        unfinished = _unfinished.pop(self, None) or Unfinished()
        try:
            with torch.inference_mode(False):  # the caller may have disabled gradients
                fitted._fit(X, y, sample_weight, groups, unfinished)
        except BaseException:
            _unfinished[self] = unfinished
            raise
        self._update_from(fitted)
        context.call_on_fit_task_end(**data, reconstruction_attributes={})
        return self

    def _fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None,
        groups: ArrayLike | None,
        unfinished: Unfinished,
    ) -> None:
        grid, regressors = self._grid()
        first = regressors[0]
        splits: list[Fold] | None = None
        labels: np.ndarray | None = None

        def parts_of(y: np.ndarray) -> np.ndarray | None:
            nonlocal splits, labels
            if groups is not None:
                check_consistent_length(y, groups)
            if self.cv is None or isinstance(self.cv, Integral):
                if groups is not None:
                    labels = read_groups(groups)
                return labels
            splits = row_splits(self.cv, y, groups)
            return parts_of_rows(splits, len(y))

        rows, targets, loss_fn = first._check_rows(X, y, sample_weight, False, parts_of)
        random = unfinished.resume(
            first._random(),
            (rows, splits, labels, first._llm().fingerprint, repr(self._searched_settings())),
        )
        if splits is not None:
            folds = pair_folds(splits, rows.pairs)
        elif labels is not None:
            kept = rows.pairs >= 0
            of_pair = np.empty(len(rows.texts), dtype=np.int64)
            of_pair[rows.pairs[kept]] = labels[kept]
            folds = random_folds(of_pair, self._n_folds(), "groups", random)
        else:
            folds = random_folds(rows.groups, self._n_folds(), "different texts", random)
        with self._fit_progress(
            rows.n_texts,
            n_folds=len(folds),
            n_trained=len(unfinished.trained),
            head_options=first._head_options(),
        ):
            first.layer_, first.layer_scores_ = first._find_layer(rows, targets, random)
            states = first._states(rows.texts_of_view(0), first.layer_)
            examples = Examples.of(states, targets, rows.weight)
            options = first._training_options(loss_fn)
            n_outputs = targets.shape[1]
            candidates = candidates_of(
                grid,
                regressors,
                loss_fn,
                input_size=states.hidden_size,
                n_outputs=n_outputs,
                head_options=states.head_options,
            )
            seeds = random.randint(np.iinfo(np.int32).max, size=(len(folds), 2)).tolist()
            weight = None
            if sample_weight is not None:
                weight = _check_sample_weight(sample_weight, np.empty(len(rows.pairs)))
            ridges = fit_linear_path(
                examples,
                rows.groups,
                folds,
                [candidate.sizes["state_norm"] for candidate in candidates],
                linear_path=self.linear_path,
                by_fold=splits is not None or labels is not None,
                loss_fn=loss_fn,
                random=random,
                max_memory=options["max_memory"],
            )
            scorer = Scorer(
                self.scoring, first, loss_fn, np.asarray(y), weight, rows, folds, splits
            )

            def score(candidate: Candidate, fold: int, predictions: np.ndarray) -> float:
                own = ridges.get(candidate.sizes["state_norm"])
                if own is not None:
                    predictions = with_ridges(examples, rows.groups, folds[fold], predictions, own)
                return scorer(fold, predictions)

            result = search_heads(
                examples,
                folds,
                candidates,
                score,
                seeds=seeds,
                trained=unfinished.trained,
                progress=bool(self.verbose),
                n_iter_no_change=self.n_iter_no_change,
                **options,
            )
            best = regressors[result.best_index]
            trainings = [head.training for head in result.heads]
            ensemble, _, oof_predictions, summary = combine(
                examples,
                rows.groups,
                folds,
                [cast(RelishHead, head.head) for head in result.heads],
                trainings,
                ridges.get(candidates[result.best_index].sizes["state_norm"]),
                loss_fn=loss_fn,
            )
        own = best._get_param_names()
        best.__dict__ |= {name: value for name, value in vars(first).items() if name not in own}
        best._set_fitted(ensemble, history_of(trainings), summary)
        best._set_out_of_fold(oof_predictions, targets, rows.weight, loss_fn)
        self.__dict__.pop("feature_names_in_", None)  # of an earlier fit
        self.__dict__ |= {name: value for name, value in vars(best).items() if name not in own}
        self.best_estimator_ = best.set_params(n_estimators=len(folds))
        self.best_index_, self.n_splits_ = result.best_index, len(folds)
        self.best_params_ = grid[result.best_index]
        self.cv_results_ = cv_results(grid, result)
        self.best_score_ = float(self.cv_results_["mean_test_score"][result.best_index])

    def _to_save(self) -> RelishRegressor:
        return self.best_estimator_

    def _plan(
        self,
        n_texts: int,
        input_size: int,
        n_folds: int | None = None,
        n_trained: int = 0,
        *,
        head_options: dict[str, bool] | None = None,
    ) -> Plan:
        """The trainings of a search; None folds: as many as `cv` says, if it does."""
        grid, regressors = self._grid()
        if n_folds is None:
            cv: Any = self.cv
            n_folds = self._n_folds()
            if isinstance(cv, Sized):
                n_folds = max(1, len(cv))
            elif hasattr(cv, "get_n_splits"):
                with suppress(TypeError, ValueError):  # it depends on the rows or the groups
                    n_folds = int(cv.get_n_splits())
        loss_fn = regressors[0]._loss_fn(np.ones(1))
        sizes = {"input_size": input_size, "n_outputs": 1}
        candidates = candidates_of(
            grid, regressors, loss_fn, **sizes, head_options=head_options or {}
        )
        shared = shared_trainings(candidates)
        n_held_out = min(round(n_texts / n_folds), n_texts - 1)
        return Plan(
            [[candidates[index] for index in members] for members in shared],
            max(0, number_of_trainings(len(shared), n_folds) - n_trained),
            n_texts - n_held_out,
            n_held_out,
            regressors[0]._training_options(loss_fn),
        )

    def _grid(self) -> tuple[list[dict[str, Any]], list[RelishRegressor]]:
        """The values of each candidate, and a regressor with them, whose parameters are checked."""
        grid = list(ParameterGrid(self._lists()))
        return grid, [self._regressor(values) for values in grid]

    def _lists(self) -> dict[str, list[Any]]:
        """The values of each parameter that is a list."""
        lists = {}
        for name in SEARCHED:
            value = getattr(self, name)
            if isinstance(value, (list, tuple, np.ndarray)):
                lists[name] = value.tolist() if isinstance(value, np.ndarray) else list(value)
                if not lists[name]:
                    raise ValueError(f"{name} is an empty list: pass at least one value.")
        return lists

    def _regressor(self, values: dict[str, Any]) -> RelishRegressor:
        """A regressor with the parameters of a candidate, which are checked."""
        names = set(RelishRegressor._get_param_names()) & set(self._get_param_names())
        regressor = RelishRegressor(**{name: getattr(self, name) for name in names} | values)
        regressor._validate_params()
        check_head_sizes(regressor.latent_size, regressor.n_heads)
        return regressor

    def _searched_settings(self) -> dict[str, Any]:
        """The parameters that decide what is trained, given the texts and the language model."""
        ignored = ("model", "memory", "device", "model_kwargs", "cv", "scoring", "verbose")
        parameters = self.get_params(deep=False)
        settings = {name: value for name, value in parameters.items() if name not in ignored}
        return settings | {"n_folds": self._n_folds()}

    def _n_folds(self) -> int:
        """The number of folds, unless a splitter decides."""
        return int(self.cv) if isinstance(self.cv, Integral) else FOLDS


def candidates_of(
    grid: list[dict[str, Any]],
    regressors: list[RelishRegressor],
    loss_fn: Loss,
    *,
    input_size: int,
    n_outputs: int,
    head_options: dict[str, bool],
) -> list[Candidate]:
    """The candidates of a grid, from its values and their regressors."""
    return [
        Candidate(
            values,
            regressor._head_sizes(input_size, n_outputs, loss_fn) | head_options,
            {name: getattr(regressor, name) for name in TRAINING},
        )
        for values, regressor in zip(grid, regressors, strict=True)
    ]


class Unfinished:
    """What a search has trained, for a `fit` that continues it after an interruption."""

    def __init__(self) -> None:
        self.trained: dict[tuple[int, int], list[TrainedHead]] = {}
        self._digest: str | None = None
        self._random: dict[str, Any] | tuple[Any, ...] | None = None

    def resume(self, random: np.random.RandomState, *inputs: Any) -> np.random.RandomState:
        """The random state of the unfinished search; of a new one, if the inputs are not equal."""
        digest = joblib.hash(inputs)
        if digest != self._digest or self._random is None:
            self.trained.clear()
            self._digest, self._random = digest, random.get_state()
            return random
        resumed = np.random.RandomState()
        resumed.set_state(self._random)
        return resumed


# Not in the estimators: neither pickled nor cloned with them.
_unfinished: WeakKeyDictionary[RelishRegressorCV, Unfinished] = WeakKeyDictionary()


class _Predicted(RegressorMixin, BaseEstimator):
    """Predicts what it is given, for a scorer."""

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X


class Scorer:
    """Scores predictions for the rows of a fold, in the units of the target."""

    def __init__(
        self,
        scoring: str | Callable[..., float] | None,
        regressor: RelishRegressor,
        loss_fn: Loss,
        y: np.ndarray,
        sample_weight: np.ndarray | None,
        rows: TrainingRows,
        folds: Sequence[Fold],
        splits: Sequence[Fold] | None,
    ) -> None:
        self._scorer = check_scoring(_Predicted(), scoring or "r2")
        self._regressor, self._loss_fn, self._y = regressor, loss_fn, y
        metric = getattr(self._scorer, "_score_func", self._scorer)
        takes_weight = "sample_weight" in signature(metric).parameters
        self._weight = sample_weight if takes_weight else None
        self._rows, self._positions = [], []  # of each fold
        for fold, (_, held_out) in enumerate(folds):
            if splits is None:
                tested = np.flatnonzero(np.isin(rows.pairs, held_out))
            else:
                tested = splits[fold][1][rows.pairs[splits[fold][1]] >= 0]
            self._rows.append(tested)
            self._positions.append(np.searchsorted(held_out, rows.pairs[tested]))

    def __call__(self, fold: int, predictions: np.ndarray) -> float:
        """The score of the predictions for the held-out pairs of a fold; NaN is left out."""
        point = self._loss_fn.point_prediction(predictions)[self._positions[fold]]
        known = np.isfinite(point).all(axis=1)
        rows, point = self._rows[fold][known], point[known]
        predicted = self._regressor._to_target_units(point[:, :, None])[..., 0]
        weight = {} if self._weight is None else {"sample_weight": self._weight[rows]}
        return float(self._scorer(_Predicted(), predicted, self._y[rows], **weight))


def row_splits(cv: Any, y: np.ndarray, groups: ArrayLike | None) -> list[Fold]:
    """The rows of each fold of a splitter or of an iterable."""
    splits = [
        (_row_numbers(train, len(y)), _row_numbers(test, len(y)))
        for train, test in check_cv(cv, y).split(np.empty((len(y), 1)), y, groups)
    ]
    if not splits:
        raise ValueError("cv has no folds.")
    return splits


def _row_numbers(rows: ArrayLike, n_rows: int) -> np.ndarray:
    """Row numbers of a split, which may also be a bool array."""
    rows = np.asarray(rows)
    if rows.dtype == bool and rows.shape == (n_rows,):
        return np.flatnonzero(rows)
    is_whole = rows.size == 0 or np.issubdtype(rows.dtype, np.integer)
    if not is_whole or (rows.size and not (rows.min() >= 0 and rows.max() < n_rows)):
        raise ValueError(f"cv has row numbers that are not whole numbers from 0 to {n_rows - 1}.")
    return rows.astype(np.int64)


def parts_of_rows(splits: Sequence[Fold], n_rows: int) -> np.ndarray:
    """A number for each row, the same for rows with the same use in all folds."""
    member = np.zeros((n_rows, 2 * len(splits)), dtype=bool)
    for number, (train, test) in enumerate(splits):
        member[train, 2 * number] = True
        member[test, 2 * number + 1] = True
    return np.unique(member, axis=0, return_inverse=True)[1].reshape(-1)


def pair_folds(splits: Sequence[Fold], pairs: np.ndarray) -> list[Fold]:
    """The pairs of each fold, without those that were dropped."""
    folds = []
    for number, (train, test) in enumerate(splits):
        train, test = np.unique(pairs[train]), np.unique(pairs[test])
        train, test = train[train >= 0], test[test >= 0]
        if not (len(train) and len(test)):
            raise ValueError(
                f"Fold {number} of cv has no rows with a weight above 0 to train or to test on."
            )
        folds.append((train, test))
    return folds


def random_folds(
    labels: np.ndarray, n_folds: int, what: str, random: np.random.RandomState
) -> list[Fold]:
    """Random folds of pairs, with the pairs of a label together."""
    different, labels = np.unique(labels, return_inverse=True)
    if len(different) < n_folds:
        raise ValueError(
            f"cv={n_folds} needs {n_folds} or more {what} with a weight above 0, but X has"
            f" n_samples={len(different)} of them."
        )
    folds = []
    for held_out in np.array_split(random.permutation(len(different)), n_folds):
        is_held_out = np.isin(labels, held_out)
        folds.append((np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)))
    return folds


def cv_results(grid: Sequence[dict[str, Any]], result: SearchResult) -> dict[str, np.ndarray]:
    """Scores and times of all candidates, named as in `GridSearchCV`."""
    scores, seconds = result.scores, result.seconds
    n_folds = np.isfinite(scores).sum(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of candidates without any score
        mean, std = np.nanmean(scores, axis=1), np.nanstd(scores, axis=1)
        times = np.nanmean(seconds, axis=1), np.nanstd(seconds, axis=1)
    order = np.lexsort((-np.where(np.isnan(mean), -np.inf, mean), -n_folds))
    keys = [(n_folds[index], mean[index]) for index in order]
    rank = np.empty(len(grid), dtype=np.int32)
    for place, index in enumerate(order):
        same = place > 0 and keys[place] == keys[place - 1]
        rank[index] = rank[order[place - 1]] if same else place + 1
    results: dict[str, np.ndarray] = {
        "mean_fit_time": times[0],
        "std_fit_time": times[1],
        **{f"param_{name}": _objects([values[name] for values in grid]) for name in grid[0]},
        "params": _objects(grid),
    }
    results |= {f"split{fold}_test_score": column for fold, column in enumerate(scores.T)}
    return results | {
        "mean_test_score": mean,
        "std_test_score": std,
        "rank_test_score": rank,
        "n_folds": n_folds,
    }


def _objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
