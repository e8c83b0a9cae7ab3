"""Regression on texts with a frozen language model, as a scikit-learn estimator."""

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.encoder import LLMEncoder
from sklearn_relish.inspection import RefinementDisplay
from sklearn_relish.regressor import RelishRegressor
from sklearn_relish.store import StateStore

__all__ = ["FrozenLLM", "LLMEncoder", "RefinementDisplay", "RelishRegressor", "StateStore"]
__version__ = "0.1.0"
