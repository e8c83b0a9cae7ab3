"""What the estimators share: the parameters of the language model, and rows to token states."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Self

import joblib
import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, RealNotInt, StrOptions
from sklearn.utils.validation import validate_data

from sklearn_relish.inputs.prompts import (
    Table,
    pair_literals,
    read_table,
    record_batch_to_frame,
    render,
    write_cells,
)
from sklearn_relish.llm.frozen import FrozenLLM, shared_llm
from sklearn_relish.llm.prefix import with_prefix
from sklearn_relish.states.pairs import PairTemplate
from sklearn_relish.states.reader import TokenStateReader, check_reader, read_spans
from sklearn_relish.states.store import StateStore, open_store
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.versions import STAMP, check_format, stamp, warn_versions


class BaseLLMEstimator(BaseEstimator):
    """Base class of the estimators that read texts with a frozen language model.

    A subclass has the parameters that are constrained here, and its own.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "model": [str, os.PathLike, TokenStateReader],
        "layer": [
            Interval(Integral, None, None, closed="neither"),
            Interval(RealNotInt, 0, 1, closed="right"),
        ],
        "state_norm": [StrOptions({"rms"}), None],
        "prompt": [str, None],
        "prefix": [str],
        "chat_template": ["boolean"],
        "max_length": [Interval(Integral, 1, None, closed="left")],
        "long_text": [StrOptions({"truncate", "window"})],
        "memory": [str, os.PathLike, joblib.Memory, StateStore, None],
        "device": [str, torch.device, None],
        "dtype": [str, torch.dtype],
        "model_kwargs": [dict, None],
        "verbose": ["verbose"],
    }

    # Of the link in the HTML representation.
    _doc_link_module = "sklearn_relish"
    _doc_link_template = (
        "https://github.com/sklearn-relish/sklearn-relish/blob/main/docs/guide/{page}"
    )
    _guide_page: ClassVar[str] = "training.md"

    def _doc_link_url_param_generator(self) -> dict[str, str]:
        return {"page": self._guide_page}

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
        """Restore a state, unless an incompatible version of this package saved it."""
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
        """A shallow copy, which a `fit` in another thread does not change."""
        snapshot = object.__new__(type(self))
        snapshot.__dict__.update(self.__dict__)
        return snapshot

    def _update_from(self, fitted: Self) -> None:
        """Take over the fitted attributes in one assignment, so that no thread sees half of them.

        Parameters that were set since the snapshot are kept.
        """
        parameters = {name: self.__dict__[name] for name in self._get_param_names()}
        self.__dict__ = fitted.__dict__ | parameters

    def _read_table(self, X: Any, *, reset: bool) -> Table:
        """`X` as a table of texts.

        With `reset`, the names and kinds of the columns are set. Otherwise they are checked, and
        cells are converted to the kinds of `fit`.
        """
        X = record_batch_to_frame(X)
        table = read_table(X)
        # scikit-learn only checks names and shape; an array of strings would take memory.
        placeholder = X if hasattr(X, "columns") else np.broadcast_to(np.float64(0), table.shape)
        if isinstance(X, Mapping):
            self._check_names(table.names, reset=reset)
        else:
            validate_data(self, placeholder, reset=reset, skip_check_array=True)
        if reset:
            self._column_names = table.names
            table, self._column_kinds = write_cells(table)
            return table
        return write_cells(table, self._column_kinds)[0]

    def _check_names(self, names: list[str], *, reset: bool) -> None:
        """Set or check the column names of a dict, which scikit-learn does not know as a table."""
        if reset:
            self.n_features_in_ = len(names)
            self.feature_names_in_ = np.array(names, dtype=object)
        elif names != list(getattr(self, "feature_names_in_", names[: self.n_features_in_])):
            raise ValueError(
                f"X has the columns {', '.join(map(repr, names))}, but {type(self).__name__} was"
                f" fitted with the columns {', '.join(map(repr, self._column_names))}: pass these"
                " columns in this order."
            )

    def _render(self, table: Table) -> list[str]:
        """The text of each row, its columns named as in `fit`."""
        texts = render(table, self._column_names, self.prompt)
        return self._llm().as_chat(texts) if self.chat_template else texts

    def _llm(self) -> TokenStateReader:
        if not isinstance(self.model, TokenStateReader):
            llm = shared_llm(self.model, self.device, self.dtype, self.model_kwargs)
            return with_prefix(llm, self.prefix)
        if self.device is not None or self.dtype != "auto" or self.model_kwargs is not None:
            name = type(self.model).__name__
            raise ValueError(
                "device, dtype and model_kwargs apply to a model given by name, but model is a"
                f" {name}: pass them to {name} instead."
            )
        if isinstance(self.model, FrozenLLM):
            return with_prefix(self.model, self.prefix)
        check_reader(self.model)
        if self.prefix:
            raise ValueError(
                f"prefix applies to a language model, but model is a {type(self.model).__name__},"
                " which reads texts by itself: pass prefix=''."
            )
        return self.model

    def _states(self, texts: list[str], layer: int, also: Sequence[int] = ()) -> TokenStates:
        """States of texts for a fit; they are kept, see `StateStore.fetch`."""
        store = open_store(self.memory)
        return store.fetch(texts, self._llm(), layer=layer, also=also, **self._reading_options())

    def _stream(self, texts: list[str], layer: int) -> Iterator[tuple[np.ndarray, TokenStates]]:
        """States of texts for a prediction, batch by batch; see `StateStore.stream`."""
        store = open_store(self.memory)
        return store.stream(texts, self._llm(), layer=layer, **self._reading_options())

    def _places(self, texts: list[str], states: TokenStates) -> list[np.ndarray] | None:
        """The place of each token in a pair, see `PairTemplate.places`; None if it is not known."""
        pair = self._pair()
        if pair is None or states.matches is None:
            return None
        windows = self.long_text == "window"
        spans = read_spans(
            self._llm(), texts, states.lengths, max_length=self.max_length, windows=windows
        )
        return None if spans is None else list(map(pair.places, texts, spans))

    def _pair(self) -> PairTemplate | None:
        """The template of rows whose text is made of two columns of texts."""
        literals = pair_literals(self._column_names, self._column_kinds, self.prompt)
        if literals is None or not self.chat_template:
            return None if literals is None else PairTemplate(*literals)
        mark = "\x00"
        begin, _, end = self._llm().as_chat([mark])[0].partition(mark)
        before, between, after = literals
        # Many chat templates strip the text that they are given.
        return PairTemplate(begin + before.lstrip(), between, after.rstrip() + end)

    def _reading_options(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "windows": self.long_text == "window",
            "pair": self._pair(),
            "progress": bool(self.verbose),
        }
