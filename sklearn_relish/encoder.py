"""`LLMEncoder`: a frozen language model as a scikit-learn transformer.

It returns one pooled state per text, for pipelines and for comparison with the RELISH head.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin, _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_is_fitted

from sklearn_relish.base import BaseLLMEstimator
from sklearn_relish.head.pooling import POOLINGS
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.store import StateStore
from sklearn_relish.training.inference import pool_states


class LLMEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseLLMEstimator):
    """Encode texts as vectors: the pooled token states of a frozen language model.

    It shares kept states with :class:`RelishRegressor`: a text that one of them has read is not
    read again by the other if `memory`, `model`, `model_kwargs`, `layer`, `prefix`, `max_length`,
    `long_text` and `dtype` are the same. For two columns of texts, the columns and `prompt` must be
    the same too.

    Parameters
    ----------
    model : str, path or TokenStateReader, default="HuggingFaceTB/SmolLM2-135M"
        Hub id, local folder or path of a ``.gguf`` file; or a :class:`FrozenLLM`,
        or another :class:`TokenStateReader`.
    layer : int or float, default=0.6
        The layer whose states are read, as in :class:`RelishRegressor`.
    state_norm : {"rms", None}, default="rms"
        ``"rms"`` divides each token's state by its root mean square before pooling.
    pooling : {"mean", "last", "std"}, default="mean"
        The mean of a text's token states, the last token's, or the standard deviation.
    prompt : str, default=None
        Template of a row's text, as in :class:`RelishRegressor`.
    prefix : str, default=""
        Text that the model reads before the text of each row, as in :class:`RelishRegressor`.
    chat_template : bool, default=False
        Whether the text is formatted by the tokenizer's chat template.
    max_length : int, default=512
        Maximum number of tokens read at once.
    long_text : {"truncate", "window"}, default="truncate"
        What is done with longer texts, as in :class:`RelishRegressor`.
    memory : str, path, joblib.Memory or StateStore, default=None
        Where token states are kept, as in :class:`RelishRegressor`.
    device : str or torch.device, default=None
        Device of the language model. None: ``"cuda"``, else ``"mps"``, else ``"cpu"``.
    dtype : {"auto", "float32", "bfloat16", "float16"} or torch.dtype, default="auto"
        Dtype of the language model and the kept states.
    model_kwargs : dict, default=None
        Passed to `from_pretrained`, see :class:`FrozenLLM`.
    verbose : int, default=0
        If above 0, show a progress bar.

    Attributes
    ----------
    layer_ : int
        The layer that is read, from 1.
    n_features_in_ : int
        Number of columns of `X`; 1 for one-dimensional `X`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names, if `X` is a data frame or a dict whose column names are all strings.

    See Also
    --------
    RelishRegressor : Regression that attends to the token states instead of pooling them.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import RidgeCV
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_relish import LLMEncoder
    >>> encoder = LLMEncoder("HuggingFaceTB/SmolLM2-135M")
    >>> ridge = RidgeCV(np.logspace(0, 6, 25))
    >>> regressor = make_pipeline(encoder, StandardScaler(), ridge)
    >>> regressor.fit(["dull", "fine", "splendid"], [1, 3, 5]).predict(["wonderful"]).shape
    (1,)
    """

    _guide_page = "training.md#other-regressors-on-the-same-states"
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseLLMEstimator._parameter_constraints,
        "pooling": [StrOptions(set(POOLINGS))],
    }

    def __init__(
        self,
        model: str | os.PathLike[str] | TokenStateReader = "HuggingFaceTB/SmolLM2-135M",
        *,
        layer: int | float = 0.6,
        state_norm: str | None = "rms",
        pooling: str = "mean",
        prompt: str | None = None,
        prefix: str = "",
        chat_template: bool = False,
        max_length: int = 512,
        long_text: str = "truncate",
        memory: str | os.PathLike[str] | joblib.Memory | StateStore | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        model_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.layer = layer
        self.state_norm = state_norm
        self.pooling = pooling
        self.prompt = prompt
        self.prefix = prefix
        self.chat_template = chat_template
        self.max_length = max_length
        self.long_text = long_text
        self.memory = memory
        self.device = device
        self.dtype = dtype
        self.model_kwargs = model_kwargs
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # states are float32 whatever X is
        return tags

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike, y: Any = None) -> LLMEncoder:
        """Check the input and determine the layer; no text is read.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            Texts; or rows of several columns, rendered to texts by `prompt`.
        y : None
            Ignored.

        Returns
        -------
        self : LLMEncoder

        Examples
        --------
        >>> from sklearn_relish import LLMEncoder
        >>> encoder = LLMEncoder(layer=0.5, pooling="last").fit(["a text"])
        >>> encoder.transform(["a text", "another one"]).shape[0]
        2
        """
        fitted = self._snapshot()
        fitted._render(fitted._read_table(X, reset=True))
        llm = fitted._llm()
        fitted.layer_ = llm.resolve_layer(fitted.layer)
        fitted._n_features_out = llm.hidden_size
        self._update_from(fitted)
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Pooled states of texts; the token states of all texts are never in memory together.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            As in `fit`.

        Returns
        -------
        X_out : float32 ndarray of shape (n_samples, hidden size of the model)

        Examples
        --------
        >>> from sklearn_relish import LLMEncoder
        >>> states = LLMEncoder().fit(["a text"]).transform(["a text", "another one"])
        >>> len(states), states.dtype
        (2, dtype('float32'))
        """
        check_is_fitted(self)
        fitted = self._snapshot()
        texts = fitted._render(fitted._read_table(X, reset=False))
        pooled = np.empty((len(texts), fitted._n_features_out), dtype=np.float32)
        for rows, states in fitted._stream(texts, fitted.layer_):
            pooled[rows] = pool_states(states, fitted.pooling, fitted.state_norm).numpy()
        return pooled

    def fit_transform(self, X: ArrayLike, y: Any = None) -> np.ndarray:
        """Fit, and return the pooled states of the texts; token states are kept in `memory`.

        Parameters
        ----------
        X : array-like of str of shape (n_samples,), or table of shape (n_samples, n_columns)
            As in `fit`.
        y : None
            Ignored.

        Returns
        -------
        X_out : float32 ndarray of shape (n_samples, hidden size of the model)

        Examples
        --------
        >>> from sklearn_relish import LLMEncoder, StateStore
        >>> store = StateStore()
        >>> states = LLMEncoder(memory=store).fit_transform(["a text", "another one"])
        >>> len(states)
        2
        """
        fitted = self.fit(X, y)._snapshot()
        states = fitted._states(fitted._render(fitted._read_table(X, reset=False)), fitted.layer_)
        return pool_states(states, fitted.pooling, fitted.state_norm).numpy()
