"""Rows to texts: what a language model reads for each row of `X`.

A list of strings is read as it is; rows of several columns become ``column: value`` lines, or
whatever a template says.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
from scipy.sparse import issparse

ROWS_NAMED = 5  # rows that an error names before it counts the rest


@dataclass(frozen=True)
class Table:
    """The columns of an input, and what it was.

    Parameters
    ----------
    columns : list of sequences
        Cells by column, each of length `n_rows`.
    names : list of str
        The names of the columns; ``text`` for texts in one dimension, ``x0``, ``x1``, ... for
        arrays and for frames whose names are not all strings, as in scikit-learn.
    n_rows : int
    """

    columns: list[Sequence[Any]]
    names: list[str]
    n_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.n_rows, len(self.columns)


def read_table(X: Any) -> Table:
    """Columns of texts or of a table, checked.

    Parameters
    ----------
    X : sequence of str, array, Series or data frame
        One-dimensional input holds a text a row. Two-dimensional input (a NumPy array, nested
        lists, a frame of pandas, Polars or another library that Narwhals knows) holds columns.

    Returns
    -------
    Table

    Raises
    ------
    ValueError, TypeError
        If `X` is not such an input; the message names the rows.
    """
    if isinstance(X, (str, bytes)):
        raise ValueError(
            f"X is a single {type(X).__name__}: pass a list of texts, [text] for one text."
        )
    if issparse(X):
        raise TypeError("X is sparse: a language model reads texts or a dense table.")
    frame = nw.from_native(X, pass_through=True, allow_series=True)
    if isinstance(frame, nw.LazyFrame):
        raise TypeError("X is a lazy frame: collect it first.")
    if isinstance(frame, nw.DataFrame):
        columns = [column.to_list() for column in frame.iter_columns()]
        names = list(frame.columns)
        if not all(isinstance(name, str) for name in names):
            names = _array_names(len(names))
        table = Table(columns, names, len(frame))
    else:
        table = _read_array(frame.to_list() if isinstance(frame, nw.Series) else X)
    if table.n_rows == 0:
        raise ValueError(f"Found array with 0 sample(s) (shape={table.shape}): X has no rows.")
    if not table.columns:
        raise ValueError(
            f"Found array with 0 feature(s) (shape={table.shape}) while a minimum of 1 is required."
        )
    return table


def _read_array(X: Any) -> Table:
    if hasattr(X, "__array__"):
        array = X if isinstance(X, np.ma.MaskedArray) else np.asarray(X)
        if array.dtype.kind == "M":
            array = array.astype("datetime64[us]")  # which Python's own datetime can hold
        if isinstance(array, np.ma.MaskedArray):
            array = np.where(np.ma.getmaskarray(array), None, array.data.astype(object))
        if array.ndim == 2:
            _refuse_complex(array)
            columns = [column.tolist() for column in array.T]
            return Table(columns, _array_names(len(columns)), len(array))
        if array.ndim != 1:
            raise ValueError(
                f"X has {array.ndim} dimensions: expected texts in one dimension, or two dimensions"
                " of rows and columns."
            )
        X = array.tolist()
    elif not (hasattr(X, "__len__") and hasattr(X, "__iter__")) or isinstance(X, (dict, set)):
        raise TypeError(
            f"X is a {type(X).__name__}: expected a list of texts, an array or a frame."
        )
    else:
        X = list(X)
        if X and all(isinstance(row, (list, tuple, np.ndarray)) for row in X):
            widths = {len(row) for row in X}
            if len(widths) > 1:
                raise ValueError(f"X has rows of {min(widths)} to {max(widths)} columns.")
            return _read_array(np.array(X, dtype=object))
    return Table([_checked_texts(X)], ["text"], len(X))


def _array_names(n_columns: int) -> list[str]:
    """Names for columns that have none, as scikit-learn makes them."""
    return [f"x{i}" for i in range(n_columns)]


def _refuse_complex(array: np.ndarray) -> None:
    if np.iscomplexobj(array):
        raise ValueError(f"Complex data not supported: X has dtype {array.dtype}.")


def _checked_texts(texts: list[Any]) -> list[str]:
    """Texts of one-dimensional input, all of them strings."""
    if all(isinstance(text, str) for text in texts):
        return texts
    missing = [row for row, text in enumerate(texts) if _is_missing(text)]
    if missing:
        raise ValueError(
            f"X has missing texts in {name_rows(missing)}: drop these rows, or put '' where a"
            " missing text means an empty one."
        )
    wrong = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    row, kind = wrong[0], type(texts[wrong[0]]).__name__
    if isinstance(texts[row], dict):
        raise TypeError(
            f"X holds a dict in {name_rows(wrong)}: pass a frame, such as pandas.DataFrame(X) or a"
            " Dataset's to_pandas(), or one column of texts."
        )
    if isinstance(texts[row], bytes):
        raise TypeError(f"X has bytes in {name_rows(wrong)}: decode them first, bytes.decode().")
    raise ValueError(
        f"X is one-dimensional and holds no text in {name_rows(wrong)} (row {row} is a {kind})."
        " Texts must be strings. Reshape your data if these are numbers: X.reshape(-1, 1) if it is"
        " a single column, X.reshape(1, -1) if it is a single row."
    )


def render(table: Table, names: Sequence[str], prompt: str | None) -> list[str]:
    r"""The text of each row.

    Parameters
    ----------
    table : Table
    names : sequence of str
        What the columns are called in the text.
    prompt : str or None
        A template with a ``{name}`` for each column that it uses. None: the cell itself for one
        column, a line ``name: value`` for each column that is not missing for several.

    Returns
    -------
    list of str
        Missing cells leave their line out, or an empty place in a template.

    Raises
    ------
    ValueError, TypeError
        If the template names a column that is not there, or a cell can't be told as text.

    Examples
    --------
    >>> table = read_table([["Alien", 1979], ["Solaris", None]])
    >>> print(render(table, ["title", "year"], None))
    ['title: Alien\nyear: 1979', 'title: Solaris']
    >>> render(table, ["title", "year"], "{title} ({year})")
    ['Alien (1979)', 'Solaris ()']
    """
    columns = [
        [_cell_text(cell, row, name) for row, cell in enumerate(column)]
        for name, column in zip(names, table.columns, strict=True)
    ]
    empty = [
        row
        for row, cells in enumerate(zip(*columns, strict=True))
        if cells.count(None) == len(cells)
    ]
    if empty:
        raise ValueError(
            f"X has missing texts in {name_rows(empty)}, where no column has a cell: drop these"
            " rows, or put '' where a missing text means an empty one."
        )
    if prompt is not None:
        pieces = parse_prompt(prompt, names)
        texts = [
            "".join(
                literal + (row[place] or "" if place is not None else "")
                for literal, place in pieces
            )
            for row in zip(*columns, strict=True)
        ]
    elif len(columns) == 1:
        texts = [cell or "" for cell in columns[0]]
    else:
        texts = [
            "\n".join(
                f"{name}: {cell}" for name, cell in zip(names, row, strict=True) if cell is not None
            )
            for row in zip(*columns, strict=True)
        ]
    broken = [row for row, text in enumerate(texts) if not _is_unicode(text)]
    if broken:
        raise ValueError(
            f"X has lone surrogates, which are no Unicode text, in {name_rows(broken)}: clean them,"
            " text.encode('utf-8', 'replace').decode()."
        )
    return texts


def parse_prompt(prompt: str, names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Pieces of a template: a literal, and the place of the column that follows it, if any.

    Raises
    ------
    ValueError
        If a field is none of the columns, or no column is used.
    """
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"prompt={prompt!r} is not a template: {error}.") from None
    formatted = [field for _, field, spec, conversion in parts if spec or conversion]
    if formatted:
        raise ValueError(
            f"prompt={prompt!r} formats {formatted[0]!r}: cells are put in as they are, so a field"
            " is a name alone; format the column first."
        )
    parsed = [(literal, field) for literal, field, _, _ in parts]
    fields = [field for _, field in parsed if field is not None]
    unknown = [field for field in fields if field not in names]
    if unknown or not fields:
        what = f"names {{{unknown[0]}}}, which is no column" if unknown else "names no column"
        raise ValueError(
            f"prompt={prompt!r} {what}: the columns are {', '.join(map(repr, names))}. A brace that"
            " belongs to the text is written twice."
        )
    place = {name: i for i, name in enumerate(names)}
    return [(literal, None if field is None else place[field]) for literal, field in parsed]


def name_rows(rows: Sequence[int]) -> str:
    """Rows as an error names them: the first few, and how many more.

    Examples
    --------
    >>> name_rows([3])
    'row 3'
    >>> name_rows(range(10, 20))
    'rows 10, 11, 12, 13, 14 and 5 more'
    """
    named = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {named}{more}"


def _cell_text(cell: Any, row: int, name: str) -> str | None:
    """A cell as it is read, None if it is missing."""
    if isinstance(cell, str):
        return cell
    if _is_missing(cell):
        return None
    if isinstance(cell, float):
        if cell.is_integer() and abs(cell) < 1e15:
            return str(int(cell))  # 1979.0 is how a column with missing cells keeps 1979
        if abs(cell) < 1e38 and float(np.float32(cell)) == cell:
            return str(np.float32(cell))  # 0.1, and not the 0.10000000149011612 it came as
    if isinstance(cell, complex):
        raise ValueError(f"Complex data not supported: X has {cell!r} in row {row} of {name!r}.")
    if isinstance(cell, (bytes, bytearray)):
        raise TypeError(f"X has bytes in row {row} of column {name!r}: decode them first.")
    if type(cell).__repr__ is object.__repr__ and type(cell).__str__ is object.__str__:
        raise TypeError(
            f"X has a {type(cell).__name__} in row {row} of column {name!r}: a cell's argument must"
            " be a string, a number or what can be read as text."
        )
    return str(cell)


def _is_missing(cell: Any) -> bool:
    """None, NaN, NaT or pandas.NA."""
    if cell is None:
        return True
    try:
        return bool(cell != cell)  # NaN and NaT differ from themselves
    except TypeError:  # pandas.NA refuses to be true or false
        return True
    except ValueError:  # an array, of several truths
        return False


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
