"""Regression on texts with a frozen language model, as a scikit-learn estimator."""

from sklearn_relish.display import RefinementDisplay
from sklearn_relish.encoder import LLMEncoder
from sklearn_relish.head import RelishHead
from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.regressor import RelishRegressor
from sklearn_relish.regressor_cv import RelishRegressorCV
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.store import StateStore
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.versions import __version__

__all__ = [
    "FrozenLLM",
    "LLMEncoder",
    "RefinementDisplay",
    "RelishHead",
    "RelishRegressor",
    "RelishRegressorCV",
    "StateStore",
    "TokenStateReader",
    "TokenStates",
    "__version__",
]
