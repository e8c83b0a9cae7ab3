"""`RelishRegressor`: scikit-learn's front door to a frozen language model and the RELISH head.

It checks what it is given and asks the other rooms in turn; it does no tensor maths itself.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import MultiOutputMixin, RegressorMixin, _fit_context
from sklearn.utils import check_consistent_length, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.ensemble import fit_ensemble
from sklearn_relish.head import check_head_sizes
from sklearn_relish.layers import SHARES, choose_layer, sample_texts
from sklearn_relish.prompts import name_rows
from sklearn_relish.reader import LLMReader
from sklearn_relish.store import StateStore
from sklearn_relish.training import (
    LOSSES,
    Examples,
    auto_epochs,
    head_answers,
)

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
    max_length : int, default=512
        Tokens of a text that are read; longer texts are cut, and counted in a warning.
    latent_size : int, default=256
        Size of the latent state; a multiple of `n_heads`.
    n_iterations : int, default=3
        How often the latent state is refined.
    n_heads : int, default=8
        Attention heads.
    share_weights : bool, default=False
        Whether all iterations use one block's weights.
    loss : {"huber", "squared_error"}, default="huber"
        Loss on the standardized target. Huber's is squared up to one standard deviation and
        linear beyond.
    learning_rate : float, default=5e-4
        Peak of the one-cycle schedule of AdamW.
    weight_decay : float, default=0.01
        Of AdamW.
    batch_size : int, default=32
        Texts of a training step.
    max_epochs : int or "auto", default="auto"
        Passes over the training rows, the length of the schedule. ``"auto"`` is 10, or as many as
        make 200 steps of a small set.
    early_stopping : bool, default=True
        Whether a share of the rows is held out from a head, and the epoch with the lowest loss on
        them kept.
    validation_fraction : float, default=0.2
        That share of the texts, another one for each of the estimators; equal texts are held out
        together.
    n_estimators : int or "auto", default="auto"
        RELISH heads that are fitted, each with other rows held out, and averaged. ``"auto"`` is 5
        up to 1,000 rows and 3 beyond; 1 is the published choice, and the fastest.
    linear_path : bool, default=True
        Whether ridges on the mean and the last token state stand beside the heads, all of them
        weighed by what they foretell of the held-out rows: where there is little to learn from, or
        much noise, they carry the answer. Without held-out rows, or with fewer than 10, there is
        none.
    n_iter_no_change : int, default=None
        Training stops after that many epochs without a lower validation loss. None lets the
        schedule run to its end, where the learning rate falls and most is gained.
    memory : str, path, joblib.Memory or StateStore, default=None
        Where token states are kept; a text whose states are there is not read again. A folder
        serves other processes and later days. None: this process, up to 2 GiB, and beyond that
        a temporary folder that goes with it. A :class:`StateStore` says more: bounds, what is
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
        same to the last bit.
    verbose : int, default=0
        Above 0, bars show the texts read and the epochs.

    Attributes
    ----------
    head_ : RelishEnsemble
        The fitted network, on the CPU, answering in standardized units: ``head_.heads`` are the
        RELISH heads, ``head_.linear`` is the linear path or None.
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
    A pickle holds the head and the model's name, not the language model, and opens where there is
    no GPU. On a CPU no text is padded and the head answers in float64, so a prediction does not
    depend on the texts beside it (where the language model computes in float32, some millionths
    of rounding remain for a text that is read anew).

    With `GridSearchCV` and its like, no fold, candidate or refit of a process reads a text a second
    time. With `n_jobs`, give a folder as `memory`: of what several processes lack, each then reads
    a part, and where all has been read none loads the language model.

    References
    ----------
    .. [1] Su and Lease, "RELISH: REgression with a Latent Iterative State Head", arXiv 2604.01206.

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
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_epochs": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_estimators": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "linear_path": ["boolean"],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), None],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        model: str | os.PathLike[str] | FrozenLLM = "HuggingFaceTB/SmolLM2-135M",
        *,
        layer: int | float | str = 0.6,
        state_norm: str | None = "rms",
        prompt: str | None = None,
        max_length: int = 512,
        latent_size: int = 256,
        n_iterations: int = 3,
        n_heads: int = 8,
        share_weights: bool = False,
        loss: str = "huber",
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        batch_size: int = 32,
        max_epochs: int | str = "auto",
        early_stopping: bool = True,
        validation_fraction: float = 0.2,
        n_estimators: int | str = "auto",
        linear_path: bool = True,
        n_iter_no_change: int | None = None,
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
        self.max_length = max_length
        self.latent_size = latent_size
        self.n_iterations = n_iterations
        self.n_heads = n_heads
        self.share_weights = share_weights
        self.loss = loss
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

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> RelishRegressor:
        """Fit the head on the token states of texts.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            Texts; or rows of several columns, rendered to texts by `prompt`.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            The numbers to predict.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows; one of weight 0 is as good as absent. None: all alike.

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
        fitted = copy.copy(self)  # a fit that is refused or interrupted leaves the earlier one
        fitted._fit(X, y, sample_weight)
        self.__dict__ = fitted.__dict__
        return self

    def _fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None) -> None:
        table = self._read_table(X, reset=True)
        y = self._check_y(y)
        check_consistent_length(np.empty(table.n_rows), y)
        weight = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
        # In the head's precision: what is nothing there is as good as absent.
        used = np.flatnonzero((weight / (weight.mean() or 1.0)).astype(np.float32))
        check_head_sizes(self.latent_size, self.n_heads)
        texts = self._render(table)
        y, weight = y[used], weight[used]
        targets, mean, scale = _standardize(y.reshape(len(y), -1), weight)
        llm = self._llm()
        device = llm.torch_device
        random = check_random_state(self.random_state)
        texts = [texts[row] for row in used]
        n_estimators = self.n_estimators
        if n_estimators == "auto":
            n_estimators = MANY if len(used) <= SMALL_SET else FEW
        if self.layer != "auto":
            layer, scores = llm.resolve_layer(self.layer), None
        numbers: dict[str, int] = {}
        text = np.array([numbers.setdefault(some, len(numbers)) for some in texts], dtype=np.int64)
        held_out = self._held_out(text, n_estimators, random)

        if self.layer == "auto":
            layer, scores = self._choose_layer(texts, text, targets, weight, random)
        states = self._states(texts, layer)
        head, trainings = fit_ensemble(
            Examples.of(states, targets, weight / weight.mean()),
            text,
            held_out,
            linear_path=self.linear_path,
            sizes={
                "input_size": states.hidden_size,
                "latent_size": self.latent_size,
                "n_heads": self.n_heads,
                "n_iterations": self.n_iterations,
                "n_outputs": targets.shape[1],
                "share_weights": self.share_weights,
                "state_norm": self.state_norm,
            },
            random=random,
            loss=self.loss,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            max_epochs=(
                auto_epochs(len(used) - len(held_out[0]), self.batch_size)
                if self.max_epochs == "auto"
                else self.max_epochs
            ),
            n_iter_no_change=self.n_iter_no_change,
            device=device,
            progress=bool(self.verbose),
        )
        self.head_, self.layer_, self.n_outputs_ = head, layer, targets.shape[1]
        self.layer_scores_ = scores
        self._y_mean, self._y_scale, self._y_shape = mean, scale, y.shape[1:]
        self.history_ = [
            {"estimator": number, **epoch}
            for number, training in enumerate(trainings)
            for epoch in training.history
        ]
        self.best_epoch_ = [training.best_epoch for training in trainings]
        self.n_epochs_ = len(self.history_)
        self._llm_fingerprint = llm.fingerprint

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
        check_is_fitted(self)
        texts = self._render(self._read_table(X, reset=False))
        llm = self._llm()
        if llm.fingerprint != self._llm_fingerprint:
            warnings.warn(
                f"{llm!r} is not the model, or not the revision of it, whose states the head was"
                " fitted on: unless the weights are the same, the predictions are wrong. Fit"
                " again, or bring the fitted one back.",
                UserWarning,
                stacklevel=2,
            )
        answers = head_answers(self.head_, self._states(texts, self.layer_), llm.torch_device)
        return (answers * self._y_scale + self._y_mean).reshape(len(texts), *self._y_shape)

    def _check_y(self, y: ArrayLike) -> np.ndarray:
        """Targets as float64, of one dimension or two, all finite."""
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        given = np.asarray(y)
        if given.ndim == 0 or given.dtype.kind in "mM":
            what = given.dtype if given.ndim else "a single value"
            raise ValueError(f"y must hold a number for each row, got {what}.")
        y = check_array(
            y,
            dtype=np.float64,
            ensure_2d=False,
            ensure_all_finite=False,
            ensure_min_samples=0,
            input_name="y",
        )
        broken = np.flatnonzero(~np.isfinite(y).reshape(len(y), -1).all(axis=1))
        if len(broken):
            raise ValueError(
                f"Input y contains NaN or infinity in {name_rows(broken)}: drop these rows."
            )
        return y

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
            layer: Examples.of(
                self._states(some, layer), targets[rows], weight[rows] / weight.mean()
            ).merged(number)
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


def _standardize(y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets of mean 0 and standard deviation 1, and the mean and scale that lead back.

    A constant target has scale 0, so the head's answer falls away and the constant is left.
    """
    constant = np.ptp(y, axis=0) == 0
    if constant.any():
        which = f" in columns {np.flatnonzero(constant).tolist()}" if len(constant) > 1 else ""
        warnings.warn(
            f"y is constant{which}: the prediction will be that constant.",
            UserWarning,
            stacklevel=4,
        )
    mean = np.where(constant, y[0], np.average(y, axis=0, weights=weight))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scale = np.sqrt(np.average((y - mean) ** 2, axis=0, weights=weight))
    if not (np.isfinite(scale).all() and (constant | (scale > 0)).all()):
        raise ValueError(
            "y, or sample_weight, spans more than float64 can square: bring it nearer to 1 first,"
            " by a factor or a logarithm."
        )
    return (y - mean) / np.where(constant, 1.0, scale), mean, np.where(constant, 0.0, scale)
