"""Cells to text: equal values have the same text in every library and file format.

A date is ``2012-01-01`` and an integral float is ``1979``, also after a CSV file. `fit` stores
the kind of each column; `predict` converts cells to it, and refuses those that it cannot convert
without loss.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence, Set
from decimal import Decimal
from functools import partial
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np

from sklearn_relish.utils.messages import name_rows, warn

EXACT = 2**53  # larger integers are not all exact as floats
OR_MISSING = " or missing"  # suffix of the kind of a column with missing cells
LONGEST_VALUE = 64  # characters of a number or a date; longer ones are text

MISSING_STRINGS = {"", "nan", "NaN", "None", "NaT", "<NA>"}  # str() of missing cells
BOOLEAN_STRINGS = {"True": "True", "true": "True", "TRUE": "True"}
BOOLEAN_STRINGS |= {"False": "False", "false": "False", "FALSE": "False"}
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?|[+-]?inf")
TIME = r"(?P<time>\d\d:\d\d)(?P<seconds>:\d\d)?(?:\.(?P<fraction>\d+))?"
ISO_TIME = re.compile(TIME, re.ASCII)
ISO_DATE = re.compile(
    rf"(?P<date>\d{{4}}-\d\d-\d\d)(?:[ T]{TIME}(?P<zone>Z|[+-]\d\d:?\d\d)?)?", re.ASCII
)
DURATION = re.compile(rf"(?P<days>-?\d+) days?(?:,? \+?{TIME})?", re.ASCII)
STABLE_ADVICE = ": a cell's argument must be a string, a number or another value of a stable text."
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")

WRITERS: list[tuple[tuple[type, ...], str, Callable[[Any], str]]]


def column_texts(
    column: Sequence[Any], name: str, kind: str | None = None
) -> tuple[list[str | None], str]:
    """The text of each cell of a column, and the kind of the column.

    Parameters
    ----------
    column : sequence
        Cells; some may be missing.
    name : str
        The column's name, for errors.
    kind : str, default=None
        The column's kind in `fit`. None: it is inferred from the cells.

    Returns
    -------
    texts : list of str or None
        None for a missing cell. Equal values have the same text, whatever their type. Strings of
        a text column are unchanged.
    kind : str
        ``"text"``, ``"integer"``, ``"number"``, ``"boolean"``, ``"date"`` (with or without a
        time), ``"time"``, ``"duration"``, ``"other"``, ``"mixed"`` for several kinds, or
        ``"missing"`` if all cells are missing. ``"date text"`` is a column of strings that are
        all ISO dates. ``"text/number"``, ``"text/boolean"`` and ``"text/boolean/number"`` are
        columns of strings, some of which are the exact text of such values. The kind of a column
        with missing cells ends in ``" or missing"``.

    Raises
    ------
    ValueError
        If a cell cannot be converted to the kind in `fit`; the message names the column and rows.
    TypeError
        If a cell's text would differ in another process.

    Warns
    -----
    UserWarning
        If all cells are missing but none was in `fit`, or if all were missing in `fit` only.

    Examples
    --------
    >>> column_texts([1979.0, None], "year")
    (['1979', None], 'number or missing')
    >>> column_texts(["1979.0", "", True], "year", "integer or missing")
    (['1979', None, '1'], 'integer or missing')
    >>> column_texts(["2012-01-01T00:00:00", "2012-01-01 10:30:00.50"], "day", "date")
    (['2012-01-01', '2012-01-01 10:30:00.5'], 'date')
    >>> column_texts(["007", "12"], "code")
    (['007', '12'], 'text')
    """
    kinds, texts = _write(column, name)
    if kind is None:
        kind = _common_kind(kinds, texts)
        if kind.removesuffix(OR_MISSING) == "date text":
            texts = _converted(kinds, texts, "date text", name)
        return texts, kind
    base = kind.removesuffix(OR_MISSING)
    cell_kind = "text" if base.startswith("text") else base
    if not {cell_kind, "missing"}.issuperset(kinds):
        texts = _converted(kinds, texts, base, name)
    warning = None
    if base == "missing":
        if any(text is not None for text in texts):
            warning = "was missing in all rows of fit but is not now: nothing was learned about it."
    elif base == kind and all(text is None for text in texts):
        warning = "is missing in all rows, but was missing in no row of fit."
    if warning:
        warn(f"Column {name!r} {warning}")
    return texts, kind


def is_missing(cell: Any) -> bool:
    """Whether a cell is None, NaN, NaT or pandas.NA."""
    if cell is None:
        return True
    if isinstance(cell, Decimal):
        return cell.is_nan()
    try:
        return bool(cell != cell)  # NaN and NaT differ from themselves
    except TypeError:  # pandas.NA has no truth value
        return True
    except ValueError:  # an array has several truth values
        return False


class _NoTextError(Exception):
    """A cell has no stable text. Arguments: class, subject and advice of the public error."""


def _write(column: Sequence[Any], name: str) -> tuple[list[str], list[str | None]]:
    """The kind and the text of each cell, from its type and value only."""
    types = set(map(type, column))
    if types == {str}:
        return ["text"] * len(column), list(column)
    writers = {cell_type: _writer(cell_type) for cell_type in types}
    texts: list[str | None] = []
    try:
        if len(types) == 1:
            texts.extend(map(writers[type(column[0])][1], column))
        else:
            texts.extend(writers[type(cell)][1](cell) for cell in column)
    except _NoTextError as refusal:
        error, subject, advice = refusal.args
        raise error(f"X has {subject} in row {len(texts)} of column {name!r}{advice}") from None
    kinds = [
        "missing" if text is None else writers[type(cell)][0]
        for cell, text in zip(column, texts, strict=True)
    ]
    return kinds, texts


def _common_kind(kinds: list[str], texts: list[str | None]) -> str:
    """The kind of a column, from the kinds and texts of its cells."""
    found = set(kinds) - {"missing"}
    ending = OR_MISSING if "missing" in kinds else ""
    if not found:
        return "missing"
    if found == {"integer", "number"}:
        return "number" + ending
    if len(found) > 1:
        return "mixed" + ending
    (kind,) = found
    return (_kind_of_texts(texts) if kind == "text" else kind) + ending


def _writer(cell_type: type) -> tuple[str, Callable[[Any], str | None]]:
    """The kind of cells of one type, and the function that gives their text."""
    for types, kind, write in WRITERS:
        if issubclass(cell_type, types):
            if kind in ("text", "boolean", "integer"):  # these types have no missing value
                return kind, write
            return kind, partial(_unless_missing, write)
    return "other", _other_text


def _unless_missing(write: Callable[[Any], str], cell: Any) -> str | None:
    return None if is_missing(cell) else write(cell)


def _converted(kinds: list[str], texts: list[str | None], base: str, name: str) -> list[str | None]:
    """Texts of cells, converted to the kind of the column in `fit`."""
    if base in UNCONVERTED:
        return texts
    convert = CONVERSIONS[base]
    converted, refused = [], []
    for row, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
        try:
            converted.append(None if text is None else convert(kind, text))
        except ValueError:
            refused.append(row)
    if not refused:
        return converted
    row = refused[0]
    shown = repr(texts[row])[:LONGEST_VALUE]
    if "text" in base:
        advice = (
            "Keep the column as text: a CSV file is read with"
            f" pandas.read_csv(..., dtype={{{name!r}: str}})."
        )
    elif base == "integer" and kinds[row] == "number":
        advice = (
            "A float does not hold every such integer: keep the column as integers, for example"
            " with pandas' Int64."
        )
    else:
        advice = "Convert the column, and use None or NaN for missing cells."
    raise ValueError(
        f"Column {name!r} was of kind {base!r} in fit, but {name_rows(refused)} cannot be converted"
        f" to it: row {row} has {shown}, of kind {kinds[row]!r}. {advice}"
    )


def _kind_of_texts(texts: Sequence[str | None]) -> str:
    """The kind of a column of strings, which tells what other values some of them look like."""
    if all(text is None or _canonical_date(text) for text in texts):
        return "date text"
    kind = "text"
    for other, pattern, write in (
        ("boolean", None, BOOLEAN_STRINGS.get),
        ("number", NUMBER, _canonical_number),
    ):
        found = {
            text
            for text in texts
            if text is not None
            and len(text) <= LONGEST_VALUE
            and (pattern.fullmatch(text) if pattern else text in BOOLEAN_STRINGS)
        }
        if found and all(write(text) == text for text in found):
            kind += f"/{other}"
    return kind


def _number(kind: str, text: str) -> str | None:
    if kind in ("integer", "number"):
        return text
    if kind == "boolean":
        return str(int(text == "True"))
    if kind == "text" and text in MISSING_STRINGS:
        return None
    if kind == "text" and len(text) <= LONGEST_VALUE and NUMBER.fullmatch(text.strip()):
        return _canonical_number(text.strip())
    raise ValueError


def _integer(kind: str, text: str) -> str | None:
    if kind == "number" and EXACT <= abs(float(text)) < np.inf:
        raise ValueError
    return _number(kind, text)


def _boolean(kind: str, text: str) -> str | None:
    if kind == "boolean":
        return text
    if kind == "text" and text in MISSING_STRINGS:
        return None
    if kind == "text" and text.strip() in BOOLEAN_STRINGS:
        return BOOLEAN_STRINGS[text.strip()]
    if kind in ("integer", "number") and text in ("0", "1"):
        return str(text == "1")
    raise ValueError


def _kind_or_string(
    own_kind: str, parse: Callable[[str], str | None]
) -> Callable[[str, str], str | None]:
    """A conversion that accepts cells of one kind, and strings that `parse` gives a text for."""

    def convert(kind: str, text: str) -> str | None:
        if kind == own_kind:
            return text
        if kind == "text" and text in MISSING_STRINGS:
            return None
        parsed = parse(text.strip()) if kind == "text" else None
        if parsed is None:
            raise ValueError
        return parsed

    return convert


def _text_or(*kinds: str) -> Callable[[str, str], str]:
    """A conversion to text that also accepts cells of the given kinds."""

    def convert(kind: str, text: str) -> str:
        if kind == "text" or kind in kinds:
            return text
        raise ValueError

    return convert


def _date_or_text(kind: str, text: str) -> str:
    if kind == "date":
        return text
    if kind == "text":
        return _canonical_date(text) or text
    raise ValueError


def _canonical_number(text: str) -> str:
    if text.lstrip("+-").isdigit():
        return str(int(text))
    return _fraction_text(Decimal(text))


def _canonical_date(text: str) -> str | None:
    """The text of a date in ISO format, None for any other string."""
    match = ISO_DATE.fullmatch(text) if len(text) <= LONGEST_VALUE else None
    if match is None:
        return None
    try:
        datetime.date.fromisoformat(match["date"])
    except ValueError:
        return None
    if match["time"] is None:
        return match["date"]
    time = _time_of(match)
    zone = {None: "", "Z": "+00:00"}.get(match["zone"], match["zone"])
    if zone and ":" not in zone:
        zone = f"{zone[:3]}:{zone[3:]}"
    return time and _without_zeros(f"{match['date']} {time}{zone}")


def _canonical_time(text: str) -> str | None:
    match = ISO_TIME.fullmatch(text)
    return match and _time_of(match)


def _canonical_duration(text: str) -> str | None:
    match = DURATION.fullmatch(text) if len(text) <= LONGEST_VALUE else None
    if match is None:
        return None
    time = _time_of(match) if match["time"] else "00:00:00"
    return time and _without_zeros(f"{int(match['days'])} days {time}")


def _time_of(match: re.Match[str]) -> str | None:
    """The time of day of a match, None if there is no such time."""
    time = match["time"] + (match["seconds"] or ":00")
    try:
        datetime.time.fromisoformat(time)
    except ValueError:
        return None
    fraction = (match["fraction"] or "").rstrip("0")
    return f"{time}.{fraction}" if fraction else time


def _without_zeros(text: str) -> str:
    """Remove trailing zeros of a fraction of a second, and a time of midnight."""
    if "." in text:
        start, _, rest = text.partition(".")
        suffix = rest.lstrip("0123456789")
        fraction = rest.removesuffix(suffix).rstrip("0")
        text = start + ("." + fraction if fraction else "") + suffix
    return text.removesuffix(" 00:00:00")


def _float_text(cell: float) -> str:
    if abs(cell) < EXACT and cell.is_integer():
        return str(int(cell))  # a column with missing cells stores 1979 as 1979.0
    text = repr(float(cell))
    if len(text) > 9 and abs(cell) < 1e38 and float(np.float32(cell)) == cell:
        short = str(np.float32(cell))
        if len(text) - len(short) > 3:  # 0.1, not 0.10000000149011612
            return short
    return text


def _decimal_text(cell: Decimal) -> str:
    is_integer = cell.is_finite() and cell.as_tuple().exponent == 0
    return str(int(cell)) if is_integer else _fraction_text(cell)


def _fraction_text(cell: Decimal) -> str:
    """The text of the equal float if there is one, else all digits."""
    number = float(cell)
    if not cell.is_finite() or (np.isfinite(number) and Decimal(repr(number)) == cell):
        return _float_text(number)
    if abs(cell.adjusted()) > LONGEST_VALUE:
        return str(cell)
    text = format(cell, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _numpy_date_text(cell: np.datetime64) -> str:
    unit, _ = np.datetime_data(cell.dtype)
    if unit in ("Y", "M", "W", "D"):
        return str(cell.astype("M8[D]"))
    unit = "s" if unit in ("h", "m") else unit
    text = np.datetime_as_string(cell, unit=unit)  # type: ignore[call-overload]  # unit is any str
    return _without_zeros(text.replace("T", " "))


def _duration_text(cell: datetime.timedelta) -> str:
    nanoseconds = (cell.days * 86_400 + cell.seconds) * 10**9 + cell.microseconds * 1000
    return _nanoseconds_text(nanoseconds + getattr(cell, "nanoseconds", 0))  # of pandas


def _nanoseconds_text(nanoseconds: int) -> str:
    seconds, fraction = divmod(nanoseconds, 10**9)
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return _without_zeros(f"{days} days {hour:02}:{minute:02}:{second:02}.{fraction:09}")


def _refuse(error: type[Exception], subject: str, advice: str) -> Callable[[Any], str]:
    def refuse(cell: Any) -> str:
        raise _NoTextError(error, subject, advice)

    return refuse


def _other_text(cell: Any) -> str | None:
    """The text of any other object, if it is the same in every process."""
    if _is_array(cell):
        cell = np.asarray(cell).tolist()
        if not isinstance(cell, list):
            return _writer(type(cell))[1](cell)
    if isinstance(cell, (list, tuple, dict)):
        try:
            return str(_plain(cell))
        except RecursionError:
            subject = f"a {type(cell).__name__} that contains itself"
            raise _NoTextError(TypeError, subject, ".") from None
    kind = f"a {type(cell).__name__}"
    if isinstance(cell, (Set, Mapping)):
        raise _NoTextError(TypeError, kind, ", whose order is not fixed: sort it into a list.")
    if isinstance(cell, ModuleType) or callable(cell):
        raise _NoTextError(TypeError, kind, STABLE_ADVICE)
    if is_missing(cell):
        return None
    text = str(cell)
    if ADDRESS.search(text):
        raise _NoTextError(TypeError, kind, f", whose text has a memory address{STABLE_ADVICE}")
    return text


def _is_array(cell: Any) -> bool:
    return hasattr(cell, "__array__") and not isinstance(cell, (np.generic, type))


def _plain(cell: Any) -> Any:
    """Nested cells as plain Python lists, dicts and values."""
    if isinstance(cell, dict):
        return {str(_plain(name)): _plain(value) for name, value in cell.items()}
    if _is_array(cell):
        cell = np.asarray(cell).tolist()
    if isinstance(cell, (list, tuple)):
        return [_plain(value) for value in cell]
    kind, write = _writer(type(cell))
    text = write(cell)
    if text is None or kind in ("text", "date", "time", "duration", "other"):
        return text
    if kind == "boolean":
        return text == "True"
    return int(text) if re.fullmatch("-?[0-9]+", text) else float(text)


WRITERS = [
    ((type(None),), "missing", str),
    ((str,), "text", lambda cell: cell),
    ((bool, np.bool_), "boolean", str),
    ((np.datetime64,), "date", _numpy_date_text),
    ((np.timedelta64,), "duration", lambda cell: _nanoseconds_text(_in_nanoseconds(cell))),
    ((Integral,), "integer", lambda cell: str(int(cell))),
    ((float,), "number", _float_text),
    # The text of a float32 has its own digits, as in a CSV file.
    ((np.floating,), "number", lambda cell: _float_text(float(str(cell)))),
    ((Decimal,), "number", _decimal_text),
    ((datetime.datetime,), "date", lambda cell: _without_zeros(cell.isoformat(" "))),
    ((datetime.date,), "date", lambda cell: cell.isoformat()),
    ((datetime.time,), "time", lambda cell: _without_zeros(cell.isoformat())),
    ((datetime.timedelta,), "duration", _duration_text),
    (
        (complex, np.complexfloating),
        "other",
        _refuse(ValueError, "a complex number", ". Complex data not supported."),
    ),
    (
        (bytes, bytearray, memoryview),
        "other",
        _refuse(TypeError, "bytes", ": decode them first, bytes.decode()."),
    ),
]

CONVERSIONS: dict[str, Callable[[str, str], str | None]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "date": _kind_or_string("date", _canonical_date),
    "time": _kind_or_string("time", _canonical_time),
    "duration": _kind_or_string("duration", _canonical_duration),
    "date text": _date_or_text,
    "text": _text_or(),
    "text/number": _text_or("integer", "number"),
    "text/boolean": _text_or("boolean"),
    "text/boolean/number": _text_or("boolean", "integer", "number"),
}
UNCONVERTED = ("mixed", "other", "missing")  # kinds of columns that accept any cell


def is_column_kind(kind: str) -> bool:
    """Whether `column_texts` gives columns this kind."""
    base = kind.removesuffix(OR_MISSING)
    return base in CONVERSIONS or base in UNCONVERTED


def _in_nanoseconds(cell: np.timedelta64) -> int:
    """A NumPy duration as an integer, of any size."""
    unit, count = np.datetime_data(cell.dtype)
    one = {"W": 7 * 86_400 * 10**9, "D": 86_400 * 10**9, "h": 3_600 * 10**9, "m": 60 * 10**9}
    one |= {"s": 10**9, "ms": 10**6, "us": 1_000, "ns": 1}
    if unit not in one:
        subject = f"a duration in units of {unit!r}"
        raise _NoTextError(TypeError, subject, ": give it in days or seconds.")
    return int(cell.astype(np.int64)) * count * one[unit]
