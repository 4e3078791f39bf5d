"""SQLAlchemy's statements as psycopg takes them: the SQL, written once, and how values and rows are converted.

What a compiled statement does each time it is executed by SQLAlchemy is done here once for each statement, by the same
types: so a value means the same, whoever runs it.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import BindParameter, Dialect, Engine, literal_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.visitors import replacement_traverse
from sqlalchemy.types import TypeEngine

Processor = Callable[[Any], Any]


@dataclass(slots=True)
class Prepared:
    """A statement as the driver takes it."""

    text: str
    names: Sequence[str]
    """The parameters that a call gives."""
    constants: Mapping[str, Any]
    """Those that the statement itself gives, as far as they do not stand in its text."""
    into: Sequence[tuple[str, Processor]]
    kinds: Sequence[TypeEngine[Any]]
    make: Callable[[Sequence[Any]], Any]
    outof: Sequence[tuple[int, Processor]] | None = None
    """How the answer's values are converted; known from the first answer on."""

    def given(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters, as the driver takes them."""
        given = {**self.constants, **{name: values[name] for name in self.names}}
        for name, process in self.into:
            given[name] = process(given[name])
        return given

    def rows(self, answer: Sequence[Sequence[Any]], description: Any, dialect: Dialect) -> list[Any]:
        """The driver's rows with names, and with values as their types want them."""
        outof = self.outof
        if outof is None:
            processors = (
                kind.dialect_impl(dialect).result_processor(dialect, column.type_code)
                for kind, column in zip(self.kinds, description, strict=True)
            )
            outof = self.outof = [(place, process) for place, process in enumerate(processors) if process is not None]
        if not outof:
            return [self.make(row) for row in answer]
        return [self.make(_converted(row, outof)) for row in answer]


def _converted(row: Sequence[Any], outof: Sequence[tuple[int, Processor]]) -> list[Any]:
    values = list(row)
    for place, process in outof:
        values[place] = process(values[place])
    return values


class Statements:
    """The statements of an Engine, each prepared when it is first asked for, and as long as it exists."""

    def __init__(self, engine: Engine) -> None:
        self.dialect = engine.dialect
        self._schemas = engine.get_execution_options().get("schema_translate_map")
        self._prepared: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()

    def prepared(self, statement: Any) -> Prepared:
        found = self._prepared.get(statement)
        if found is None:
            found = self._prepared[statement] = self._prepare(statement)
        return found

    def _prepare(self, statement: Any) -> Prepared:
        inlined = replacement_traverse(statement, {}, partial(_inline, self.dialect))
        compiled: SQLCompiler = inlined.compile(
            dialect=self.dialect, schema_translate_map=self._schemas, render_schema_translate=bool(self._schemas)
        )
        into = []
        for bound, name in compiled.bind_names.items():
            process = bound.type.dialect_impl(self.dialect).bind_processor(self.dialect)
            if process is not None:
                into.append((name, process))
        columns = compiled._result_columns
        row = namedtuple("Row", [column.keyname for column in columns], rename=True)  # type: ignore[misc]
        required = {name: bound.required for bound, name in compiled.bind_names.items()}
        return Prepared(
            text=compiled.string,
            names=[name for name, its in required.items() if its],
            constants={name: compiled.params[name] for name, its in required.items() if not its},
            into=into,
            kinds=[column.type for column in columns],
            make=row._make,
        )


def _inline(dialect: Dialect, element: Any, **_: Any) -> Any:
    """A value that the statement itself gives, to be written into its text; None leaves all else as it is.

    So is a text in which SQLAlchemy would look for the names of schemas.
    """
    if not isinstance(element, BindParameter) or element.required:
        return None
    if isinstance(element.value, str) and "__[SCHEMA" in element.value:
        return None
    written = str(element.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    return literal_column(written.replace("%%", "%"), element.type)  # which doubles it again
