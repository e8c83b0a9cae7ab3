"""Regression on texts with a frozen language model, as a scikit-learn estimator."""

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.encoder import LLMEncoder
from sklearn_relish.regressor import RelishRegressor

__all__ = ["FrozenLLM", "LLMEncoder", "RelishRegressor"]
__version__ = "0.1.0"
