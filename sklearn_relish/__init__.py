"""Regression on texts with a frozen language model, as a scikit-learn estimator.

The public names are imported on first use (SPEC 1): `import sklearn_relish` alone takes no time.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sklearn_relish.display import RefinementDisplay
    from sklearn_relish.encoder import LLMEncoder
    from sklearn_relish.head.head import RelishHead
    from sklearn_relish.llm.frozen import FrozenLLM
    from sklearn_relish.regressor import RelishRegressor
    from sklearn_relish.regressor_cv import RelishRegressorCV
    from sklearn_relish.states.reader import TokenStateReader
    from sklearn_relish.states.store import StateStore
    from sklearn_relish.states.token_states import TokenStates

logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"  # the build reads it here

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

_MODULES = {  # where each public name is
    "FrozenLLM": "llm.frozen",
    "LLMEncoder": "encoder",
    "RefinementDisplay": "display",
    "RelishHead": "head.head",
    "RelishRegressor": "regressor",
    "RelishRegressorCV": "regressor_cv",
    "StateStore": "states.store",
    "TokenStateReader": "states.reader",
    "TokenStates": "states.token_states",
}


if not TYPE_CHECKING:  # a type checker would take any name for one of this package

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # so that the next use is not slower
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
