"""What the estimators share: from scikit-learn's `X` to the token states of its rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, ClassVar, Self

import joblib
import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, RealNotInt, StrOptions
from sklearn.utils.validation import validate_data

from sklearn_relish.inputs.prompts import Table, read_table, render, write_cells
from sklearn_relish.llm.frozen import FrozenLLM, shared_llm
from sklearn_relish.states.store import StateStore, open_store
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.versions import STAMP, check_format, stamp, warn_versions


class LLMReader(BaseEstimator):
    """Base of the estimators in front of a frozen language model.

    A subclass has the parameters that are constrained here among its own.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "model": [str, os.PathLike, FrozenLLM],
        "layer": [
            Interval(Integral, None, None, closed="neither"),
            Interval(RealNotInt, 0, 1, closed="right"),
        ],
        "state_norm": [StrOptions({"rms"}), None],
        "prompt": [str, None],
        "chat_template": ["boolean"],
        "max_length": [Interval(Integral, 1, None, closed="left")],
        "long_text": [StrOptions({"truncate", "window"})],
        "memory": [str, os.PathLike, joblib.Memory, StateStore, None],
        "device": [str, torch.device, None],
        "dtype": [str, torch.dtype],
        "model_kwargs": [dict, None],
        "verbose": ["verbose"],
    }

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.allow_nan = True  # a missing cell is left out of the text
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Plain names instead of paths and torch types, with the format and the versions."""
        state = dict(super().__getstate__())
        for name in ("model", "memory"):
            if isinstance(state[name], os.PathLike):
                state[name] = os.fspath(state[name])
        for name in ("device", "dtype"):
            if isinstance(state[name], (torch.device, torch.dtype)):
                state[name] = str(state[name]).removeprefix("torch.")
        state[STAMP] = stamp()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, unless a version that can't be understood has made it."""
        state, name = dict(state), type(self).__name__
        given = state.pop(STAMP, None)
        check_format(given, f"The pickled {name}")
        warn_versions(given, name)
        missing = sorted(set(self._get_param_names()) - set(state))
        if missing:
            raise ValueError(
                f"The pickled {name} has no parameter {', '.join(map(repr, missing))}: it was"
                f" saved with sklearn-relish {given['versions'].get('sklearn-relish')}. Install"
                " that version, or fit and save again."
            )
        super().__setstate__(state)

    def _snapshot(self) -> Self:
        """A shallow copy, made at once: a `fit` in another thread does not change it."""
        snapshot = object.__new__(type(self))
        snapshot.__dict__.update(self.__dict__)
        return snapshot

    def _become(self, fitted: Self) -> None:
        """Take all that was fitted, in one assignment; parameters set meanwhile stay."""
        state = self.__dict__
        self.__dict__ = fitted.__dict__ | {name: state[name] for name in self._get_param_names()}

    def _read_table(self, X: Any, *, reset: bool) -> Table:
        """`X` as a table of texts that agrees with the one of `fit`.

        With `reset`, the names and kinds of the columns are set; otherwise cells are converted to
        the kinds of `fit`.
        """
        table = read_table(X)
        # scikit-learn looks at names and shape alone; an array of strings would cost memory.
        shown = X if hasattr(X, "columns") else np.broadcast_to(np.float64(0), table.shape)
        validate_data(self, shown, reset=reset, skip_check_array=True)
        if reset:
            self._column_names = table.names
            table, self._column_kinds = write_cells(table)
            return table
        return write_cells(table, self._column_kinds)[0]

    def _render(self, table: Table) -> list[str]:
        """The text of each row, its columns named as in `fit`."""
        texts = render(table, self._column_names, self.prompt)
        return self._llm().as_chat(texts) if self.chat_template else texts

    def _llm(self) -> FrozenLLM:
        if not isinstance(self.model, FrozenLLM):
            return shared_llm(self.model, self.device, self.dtype, self.model_kwargs)
        if self.device is not None or self.dtype != "auto" or self.model_kwargs is not None:
            raise ValueError(
                "device, dtype and model_kwargs concern a model that is given by name: model is a"
                " FrozenLLM here, which takes them itself."
            )
        return self.model

    def _states(self, texts: list[str], layer: int, also: Sequence[int] = ()) -> TokenStates:
        """States for a fit, which are kept; see `StateStore.fetch`."""
        store = open_store(self.memory)
        return store.fetch(texts, self._llm(), layer=layer, also=also, **self._reading())

    def _stream(self, texts: list[str], layer: int) -> Iterator[tuple[np.ndarray, TokenStates]]:
        """States for a prediction, piece by piece; see `StateStore.stream`."""
        store = open_store(self.memory)
        return store.stream(texts, self._llm(), layer=layer, **self._reading())

    def _reading(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "windows": self.long_text == "window",
            "progress": bool(self.verbose),
        }
