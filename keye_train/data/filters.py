"""A small language for "which samples of this source": comparisons of index columns, never run as code.

    text_tokens >= 8 and (images == 1 or duration < 60) and task not in ["ocr", "chart"]

Names are the ``COLUMNS`` below; there are numbers, texts in quotes, ``+ - * /``, comparisons, ``in`` a list, ``and``,
``or``, ``not`` and parentheses. The text is parsed, each part is looked up in the tables here, and the result is worked
out by pyarrow over whole columns.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keye_train.data.facts import KINDS, Facts
from keye_train.sample import MediaKind

MAX_LENGTH = 2000

COLUMNS: dict[str, str] = {
    "text_tokens": "tokens of the text, without those of media",
    "tokens": "tokens of text and media at the recipe's resolution",
    "patches": "vision patches at the recipe's resolution",
    "images": "number of images",
    "videos": "number of videos",
    "width": "pixels of the first image or video; 0 where there is none",
    "height": "pixels of the first image or video; 0 where there is none",
    "duration": "seconds of all videos",
    "bytes": "of the sample in its shard",
    "task": "label of the sample",
}

_COMPARISONS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}


class Filter:
    """A filter expression, checked."""

    def __init__(self, text: str, setting: str) -> None:
        """Args:
            text: the expression.
            setting: its key, for messages.

        Raises:
            ValueError: not an expression of this language.
        """
        self.text, self._setting = text, setting
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{setting} has {len(text)} characters; a filter has at most {MAX_LENGTH}")
        try:
            self._root = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ValueError(f"{setting}={text!r} cannot be read: {error}") from error
        none = {name: pa.array([], pa.string() if name == "task" else pa.float64()) for name in COLUMNS}
        self.keep(none, 0)

    def keep(self, columns: Mapping[str, pa.Array], rows: int) -> np.ndarray:
        """Which samples pass: [rows] bool.

        Args:
            columns: one array for each of ``COLUMNS``.
            rows: their length.
        """
        try:
            result = self._value(self._root, columns)
            passed = pc.and_(result, pa.scalar(True))
        except (pa.ArrowException, RecursionError) as error:
            raise ValueError(f"{self._setting}={self.text!r} compares what cannot be compared: {error}") from error
        if isinstance(passed, pa.Scalar):
            return np.full(rows, bool(passed.as_py()))
        return passed.to_numpy(zero_copy_only=False).astype(bool)

    def _value(self, node: ast.expr, columns: Mapping[str, pa.Array]) -> Any:
        match node:
            case ast.Name(id=name) if name in columns:
                return columns[name]
            case ast.Name(id=name):
                raise ValueError(f"{self._setting}={self.text!r}: no column {name}; columns: {', '.join(COLUMNS)}")
            case ast.Constant(value=bool() | str() as value):
                return pa.scalar(value)
            case ast.Constant(value=int() | float() as value):
                return pa.scalar(float(value))
            case ast.BoolOp(op=operator, values=values):
                function = pc.and_ if isinstance(operator, ast.And) else pc.or_
                return self._chain(function, [self._value(value, columns) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self._value(operand, columns))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self._value(operand, columns))
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC:
                return _ARITHMETIC[type(operator)](self._value(left, columns), self._value(right, columns))
            case ast.Compare(left=left, ops=operators, comparators=others):
                sides = [left, *others]
                steps = zip(sides[:-1], operators, sides[1:], strict=True)
                return self._chain(pc.and_, [self._compare(*step, columns) for step in steps])
        raise ValueError(
            f"{self._setting}={self.text!r}: '{ast.unparse(node)}' is not part of the filter language; use columns, "
            "numbers, texts, + - * /, comparisons, in [..], and, or, not"
        )

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, columns: Mapping[str, pa.Array]) -> Any:
        value = self._value(left, columns)
        if isinstance(operator, (ast.In, ast.NotIn)) and isinstance(right, (ast.List, ast.Tuple, ast.Set)):
            options = [self._value(option, columns) for option in right.elts]
            if not options or not all(isinstance(option, pa.Scalar) for option in options):
                raise ValueError(f"{self._setting}={self.text!r}: 'in' needs a list of numbers or texts")
            among = self._chain(pc.or_, [pc.equal(value, option) for option in options])
            return among if isinstance(operator, ast.In) else pc.invert(among)
        if type(operator) not in _COMPARISONS:
            raise ValueError(f"{self._setting}={self.text!r}: compare with < <= > >= == != or 'in' a list")
        return _COMPARISONS[type(operator)](value, self._value(right, columns))

    @staticmethod
    def _chain(function: Callable[..., Any], values: list[Any]) -> Any:
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result


def filter_columns(facts: Facts, tokens: np.ndarray, patches: np.ndarray) -> dict[str, pa.Array]:
    """The ``COLUMNS`` of some samples.

    Args:
        facts: of their rows in an index, with task and size.
        tokens, patches: [rows], as measured.
    """
    rows, flat = len(facts), facts.media
    counts = facts.rows["media"].astype(np.int64)
    owners = np.repeat(np.arange(rows), counts)
    video = flat["kind"] == KINDS.index(MediaKind.video)
    frames, fps = flat["frames"].astype(float), flat["fps"]
    seconds = np.divide(frames, fps, out=np.zeros(len(flat)), where=video & (fps > 0))
    having = np.flatnonzero(counts)
    first = (np.cumsum(counts) - counts)[having]
    sides = {}
    for name in ("width", "height"):
        sides[name] = np.zeros(rows)
        sides[name][having] = flat[name][first]
    numbers = {
        "text_tokens": facts.rows["text_tokens"],
        "tokens": tokens,
        "patches": patches,
        "images": np.bincount(owners[~video], minlength=rows),
        "videos": np.bincount(owners[video], minlength=rows),
        **sides,
        "duration": np.bincount(owners, seconds, minlength=rows),
        "bytes": facts.rows["size"],
    }
    columns = {name: pa.array(np.asarray(values, dtype=np.float64)) for name, values in numbers.items()}
    task = pa.DictionaryArray.from_arrays(
        pa.array(facts.rows["task"].astype(np.int32)), pa.array(facts.tasks, pa.string())
    )
    return columns | {"task": task.cast(pa.string())}
