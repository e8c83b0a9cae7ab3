"""The methods of a fitted regressor: predictions, stages, quantiles, intervals, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from sklearn_relish.base import BaseLLMEstimator
from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.inputs.prompts import Table, pair_columns
from sklearn_relish.inputs.training_rows import TrainingRows
from sklearn_relish.states.pairs import counterparts
from sklearn_relish.states.store import CutTexts, open_store
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.conformal import Conformal
from sklearn_relish.training.inference import (
    attention_weights,
    predict_states,
    staged_predict_states,
)
from sklearn_relish.utils.messages import warn

PREDICTION_BITS = 24  # predictions are rounded to as many bits as the heads' weights have


def _has_quantiles(regressor: Any) -> bool:
    """Whether `predict_quantiles` is available; otherwise the error says why not."""
    loss = regressor.head_.loss_fn.name if hasattr(regressor, "head_") else regressor.loss
    if loss != "quantile":
        fitted = " in the fit" if hasattr(regressor, "head_") else ""
        raise AttributeError(
            f"predict_quantiles needs loss='quantile', but the loss is {loss!r}{fitted}."
        )
    return True


class RelishPredictor(BaseLLMEstimator):
    """Base class of the regressors: what a fitted ensemble of heads predicts.

    A subclass sets `head_`, `layer_`, `n_outputs_` and the private attributes below in `fit`.
    """

    head_: RelishEnsemble
    layer_: int
    n_outputs_: int
    _y_mean: np.ndarray  # mean of each output, (n_outputs,)
    _y_scale: np.ndarray  # scale of each output, (n_outputs,)
    _y_shape: tuple[int, ...]  # the shape of one target: () or (n_outputs,)
    _conformal: Conformal | None
    _fitted_templates: dict[str, Any]
    _llm_fingerprint: str
    _llm_revision: str | None

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Predict the target of texts.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            As in `fit`, with the same columns in the same order.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            In the units of the `y` of `fit`.

        Raises
        ------
        ValueError
            If `X` has other columns than in `fit`, or cells that can't be converted to their kinds;
            or if `prompt` or `chat_template` was changed after `fit`.
        OSError
            If the language model can't be loaded.

        Warns
        -----
        UserWarning
            If the language model or the prefix is not that of `fit`, or if texts were cut.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> regressor.predict(["wonderful", "bad"]).shape
        (2,)
        """
        fitted = self._snapshot()
        return fitted._point_prediction(fitted._predict_rows(X))

    def staged_predict(self, X: ArrayLike) -> Iterator[np.ndarray]:
        """Predict the target of texts after each iteration of the heads.

        The linear path, if there is one, is added to each stage. With ``deep_supervision=False``
        only the last stage has been trained.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)

        Yields
        ------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            `n_iterations` arrays; the last one is the result of `predict`.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> stages = list(regressor.staged_predict(["wonderful", "bad"]))
        >>> len(stages)
        3
        >>> stages[-1].shape
        (2,)
        """
        fitted = self._snapshot()
        # (n_samples, n_iterations, n_outputs * n_predictions)
        stages = fitted._predict_rows(X, staged_predict_states)
        return map(fitted._point_prediction, stages.transpose(1, 0, 2))

    def attention(self, X: ArrayLike) -> list[TextAttention]:
        """The attention weight of each token in each iteration.

        These are the weights of the prediction. The linear path does not attend to tokens and has
        no part in them. With several prompts they are those of the first one.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)

        Returns
        -------
        list of TextAttention
            For each text, the text as it was read, its tokens, their spans and their weights.

        Raises
        ------
        ValueError
            If the tokenizer does not provide the spans of tokens.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> attention = regressor.attention(["not bad"])[0]
        >>> attention.text
        'not bad'
        >>> attention.weights.shape == (5, 3, 8, len(attention.tokens))
        True
        """
        fitted = self._snapshot()
        texts = fitted._fitted_views()[0]._texts(X)
        tokens = fitted._llm().tokens(
            texts, max_length=fitted.max_length, windows=fitted.long_text == "window"
        )
        weights: list[Any] = [None] * len(texts)
        head, device = fitted.head_.of_view(0), fitted._llm().torch_device
        for rows, states in fitted._stream_views(X, only_first=True):
            batch_weights = attention_weights(head, states[0], device)
            for row, text_weights in zip(rows, batch_weights, strict=True):
                weights[row] = text_weights
        return [
            TextAttention(text, pieces, spans, text_weights)
            for text, (pieces, spans), text_weights in zip(texts, tokens, weights, strict=True)
        ]

    @available_if(_has_quantiles)
    def predict_quantiles(self, X: ArrayLike) -> np.ndarray:
        """Predict all quantiles; available with ``loss="quantile"``.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)

        Returns
        -------
        ndarray of shape (n_samples, n_quantiles) or (n_samples, n_outputs, n_quantiles)
            In the order of `quantile`, increasing.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(loss="quantile", quantile=[0.1, 0.5, 0.9], random_state=0)
        >>> regressor.fit(texts, y).predict_quantiles(["wonderful", "bad"]).shape
        (2, 3)
        """
        fitted = self._snapshot()
        predictions = fitted._predict_rows(X)
        return fitted._to_target_units(predictions.reshape(len(predictions), fitted.n_outputs_, -1))

    def predict_interval(self, X: ArrayLike, coverage: float = 0.9) -> np.ndarray:
        """Prediction intervals that contain about a fraction `coverage` of new targets.

        The intervals are conformal: their width follows from the errors of the out-of-fold
        predictions. With several quantiles, the outermost two are moved (conformalized quantile
        regression), and each text has a width of its own. Otherwise the width is the same for all
        texts, or, for losses with a log link, a multiple of the standard deviation that the loss
        assumes. The coverage holds on average over texts drawn like those of `fit`, not for each
        kind of text.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
        coverage : float, default=0.9
            Fraction of the targets inside, above 0 and below 1.

        Returns
        -------
        ndarray of shape (n_samples, 2) or (n_samples, n_outputs, 2)
            Lower and upper bounds, in the units of the `y` of `fit`.

        Raises
        ------
        ValueError
            If nothing was held out, or too few rows for `coverage`; also after a warm start and
            after `partial_fit`, because the heads may have been trained on any row.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = [f"text {i}" for i in range(20)], range(20)
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> regressor.predict_interval(["another text"], coverage=0.8).shape
        (1, 2)
        """
        check_is_fitted(self)
        if not (isinstance(coverage, Real) and 0 < coverage < 1):
            raise ValueError(f"coverage must be above 0 and below 1, got {coverage!r}.")
        fitted = self._snapshot()
        if fitted._conformal is None:
            raise ValueError(
                "There are no intervals: no rows were held out, or the last fit continued earlier"
                " training. Call fit with warm_start=False and early_stopping=True, on more than"
                " one text."
            )
        predictions = fitted._predict_rows(X)
        return fitted._to_target_units(fitted._conformal.interval(predictions, coverage))

    def _views(self) -> list[Self]:
        """The regressor itself if it has one prompt, else a copy of it for each prompt."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self]
        is_list = isinstance(self.prompt, (list, tuple))
        prompts = list(self.prompt) if is_list else []
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(
                f"prompt={self.prompt!r} must be a template, or a list of one or more templates."
            )
        views = []
        for prompt in prompts:
            view = self._snapshot()
            view.prompt = prompt
            views.append(view)
        return views

    def _fitted_views(self) -> list[Self]:
        """A copy of the regressor for each prompt of the fit."""
        check_is_fitted(self)
        self._check_templates()
        return self._views()

    def _templates(self) -> dict[str, Any]:
        """The parameters by which a row becomes a text."""
        prompts = [view.prompt for view in self._views()]
        prompt = prompts if len(prompts) > 1 else prompts[0]
        return {"prompt": prompt, "chat_template": self.chat_template}

    def _check_templates(self) -> None:
        """Raise an error if rows would become other texts than in the fit."""
        templates = self._templates()
        fitted = getattr(self, "_fitted_templates", templates)  # older pickles do not have it
        for name, value in fitted.items():
            if value != templates[name]:
                raise ValueError(
                    f"The regressor was fitted with {name}={value!r}, but now it has"
                    f" {name}={templates[name]!r}: set the one of the fit, or fit again with"
                    " warm_start=False."
                )

    def _texts_of_rows(self, table: Table) -> list[Any]:
        """The text of each row; with several prompts, a tuple of its texts."""
        texts = self._texts_of_views(table)
        return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))

    def _texts_of_views(self, table: Table) -> list[list[str]]:
        """The texts of the rows, for each prompt."""
        views = self._views()
        if len({view._pair() is None for view in views}) > 1:
            raise ValueError(
                f"Some templates of prompt={self.prompt!r} have two columns of texts and others do"
                " not: use two columns in all of them, or in none."
            )
        return [view._render(table) for view in views]

    def _states_of_views(self, rows: TrainingRows, layer: int) -> list[TokenStates]:
        """States for a fit of the texts of each prompt, with the same vectors and matches."""
        views = self._views()
        texts = [rows.texts_of_view(number) for number in range(len(views))]
        states = [view._states(of_view, layer) for view, of_view in zip(views, texts, strict=True)]
        return self._in_both_orders(TokenStates.aligned(states), texts)

    def _other_orders(self) -> list[int] | None:
        """For each prompt, the number of the first one with the two columns in the other order.

        None if there is not one for each prompt.
        """
        views = self._views()
        if len(views) == 1 or any(view._pair() is None for view in views):
            return None
        columns = [pair_columns(self._column_names, view.prompt) for view in views]
        if not all(each[::-1] in columns for each in columns):
            return None
        return [columns.index(each[::-1]) for each in columns]

    def _head_options(self) -> dict[str, bool]:
        """What heads read in addition to the states, see `TokenStates.head_options`."""
        is_pair = self._views()[0]._pair() is not None
        return {"pair": is_pair, "both_orders": self._other_orders() is not None}

    def _in_both_orders(
        self, states: list[TokenStates], texts: list[list[str]]
    ) -> list[TokenStates]:
        """The states of each prompt's texts, with those of the same rows in the other order."""
        others = self._other_orders()
        if others is None:
            return states
        places = [
            view._places(of_view, each)
            for view, of_view, each in zip(self._views(), texts, states, strict=True)
        ]
        result = []
        for number, other in enumerate(others):
            own_places, other_places = places[number], places[other]
            if own_places is None or other_places is None:
                return states
            positions = np.concatenate(list(map(counterparts, own_places, other_places)))
            lengths = states[number].lengths
            found = TokenStates.from_lengths(torch.from_numpy(positions)[:, None], lengths)
            result.append(replace(states[number], others=states[other], counterparts=found))
        return result

    def _texts(self, X: ArrayLike) -> list[str]:
        """The text of each row; the regressor is fitted and has its language model."""
        check_is_fitted(self)
        table = self._read_table(X, reset=False)
        self._check_model()
        return self._render(table)

    def _stream_views(
        self, X: ArrayLike, *, only_first: bool = False
    ) -> Iterator[tuple[np.ndarray, list[TokenStates]]]:
        """Row numbers, and for each prompt the states of the rows' texts; a batch at a time.

        The states of all texts are never in memory together. With `only_first`, prompts that the
        first one does not need are left out.
        """
        views = self._fitted_views()
        if only_first and self._other_orders() is None:
            views = views[:1]
        texts = [view._texts(X) for view in views]
        cut = CutTexts(self.max_length)
        for rows, states in self._stream_rows(views, texts, np.arange(len(texts[0])), cut):
            if len(views) > 1:
                batch = [[of_view[row] for row in rows] for of_view in texts]
                states = self._in_both_orders(states, batch)
            yield rows, states
        cut.warn()

    def _stream_rows(
        self, views: list[Self], texts: list[list[str]], rows: np.ndarray, cut: CutTexts
    ) -> Iterator[tuple[np.ndarray, list[TokenStates]]]:
        """The rows in batches of some MiB of states, with the states of each prompt.

        The texts of a batch of one prompt are read in batches for the next one.
        """
        *before, last = views
        if not before:
            batches = iter([(rows, list[TokenStates]())])
        else:
            batches = self._stream_rows(before, texts[:-1], rows, cut)
        for batch, states in batches:
            pieces = open_store(self.memory)._pieces(
                [texts[-1][row] for row in batch],
                self._llm(),
                cut,
                layer=self.layer_,
                **last._reading_options() | {"progress": bool(self.verbose) and not before},
            )
            for places, piece in pieces:
                chosen = torch.from_numpy(places)
                yield batch[places], [*(each[chosen] for each in states), piece]

    def _predict_rows(
        self, X: ArrayLike, function: Callable[..., Any] = predict_states
    ) -> np.ndarray:
        """Predictions in standardized units, of shape (n_samples, ..., n_outputs * n_predictions).

        They are the mean over the prompts. The predictions of each prompt are rounded to
        `PREDICTION_BITS`, because the last bits of float64 depend on the batch.
        """
        order, predictions = [], []
        for rows, states in self._stream_views(X):
            device = self._llm().torch_device
            of_views = [
                self._rounded(function(self.head_.of_view(number), each, device))
                for number, each in enumerate(states)
            ]
            order.append(rows)
            predictions.append(np.mean(of_views, axis=0))
        return np.concatenate(predictions)[np.concatenate(order).argsort()]

    def _rounded(self, predictions: np.ndarray) -> np.ndarray:
        """Predictions in `PREDICTION_BITS`."""
        if not self.head_.loss_fn.log_link:
            # a fixed step: standardized predictions are about 1 in size
            return np.ldexp(np.round(np.ldexp(predictions, PREDICTION_BITS)), -PREDICTION_BITS)
        mantissa, exponent = np.frexp(predictions)
        return np.ldexp(np.round(mantissa * 2**PREDICTION_BITS), exponent - PREDICTION_BITS)

    def _point_prediction(self, predictions: np.ndarray) -> np.ndarray:
        """One number for each output, in the units and the shape of the target."""
        point = self.head_.loss_fn.point_prediction(predictions)
        return self._to_target_units(point[:, :, None])[..., 0]

    def _to_target_units(self, predictions: np.ndarray) -> np.ndarray:
        """Predictions (n, n_outputs, k) in the units of the target, (n, k) or (n, n_outputs, k)."""
        predictions = predictions * self._y_scale[:, None] + self._y_mean[:, None]
        return predictions.reshape(len(predictions), *self._y_shape, -1)

    def _check_model(self) -> None:
        """Raise an error or warn if the language model is missing or not the one of the fit."""
        llm = self._llm()
        try:
            _ = llm.n_layers  # loads the configuration of a model given by name
        except OSError as error:
            raise OSError(
                f"{type(self).__name__} was fitted with the language model {llm.model!r}, which"
                " can't be loaded on this machine. If the model is in another place, pass it:"
                " from_pretrained(..., model=...), or set_params(model=...) after unpickling."
                f" {error}"
            ) from error
        input_size = self.head_.heads[0].sizes["input_size"]
        if self.layer_ > llm.n_layers or input_size != llm.hidden_size:
            raise ValueError(
                f"The heads were fitted on a hidden size of {input_size} at layer {self.layer_},"
                f" but {llm!r} has a hidden size of {llm.hidden_size} and {llm.n_layers} layers:"
                " pass the model that was used in fit, or fit again."
            )
        if llm.fingerprint != self._llm_fingerprint:
            fitted = f" (commit {self._llm_revision})" if self._llm_revision else ""
            warn(
                f"{llm!r}{f' (commit {llm.revision})' if llm.revision else ''} differs from the"
                f" language model, or from its revision or prefix, used in fit{fitted}: unless the"
                " weights and the prefix are the same, the predictions are wrong. Fit again, or"
                " pass the model and the prefix that were used in fit.",
            )


class TextAttention(NamedTuple):
    """The attention weights of a text, see `RelishRegressor.attention`.

    Parameters
    ----------
    text : str
        The text as it was read: a row rendered by the prompt, and formatted by the chat template if
        there is one.
    tokens : list of str
        The part of the text that each token stands for; the name of a special token.
    spans : int64 ndarray of shape (n_tokens, 2)
        Start and end of each token in the text, in characters. The span of a special token is
        empty; tokens that form one character together all have its span.
    weights : float64 ndarray of shape (n_estimators, n_iterations, n_heads, n_tokens)
        Attention weights; they sum to 1 over the tokens.

    Examples
    --------
    >>> from sklearn_relish import RelishRegressor
    >>> regressor = RelishRegressor(random_state=0).fit(["dull", "fine"] * 20, [1, 3] * 20)
    >>> text, tokens, spans, weights = regressor.attention(["not bad"])[0]
    >>> by_token = dict(zip(tokens, weights.mean(axis=(0, 1, 2))))
    """

    text: str
    tokens: list[str]
    spans: np.ndarray
    weights: np.ndarray
