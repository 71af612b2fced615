"""Statements that run at every claim, finish and creation: compiled once for each dialect, run on the driver itself.

SQLAlchemy's own execution costs a hundred microseconds a statement, the driver's five. The statement is the same
Core expression, so the two databases still share one text of it, and the types of its columns convert its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler

Convert = Callable[[Any], Any]


class Statement:
    """A Core statement. `sets` are the columns that an INSERT or UPDATE writes, each a value by its name.

    `in_order`: what runs it for many rows needs them locked in the order in which they are given.
    """

    def __init__(
        self,
        core: sa.Select[Any] | sa.Insert | sa.Update | sa.Delete,
        *,
        sets: Sequence[str] = (),
        in_order: bool = False,
    ) -> None:
        self._core, self._sets, self._in_order = core, list(sets), in_order
        self._compiled: dict[str, _Compiled] = {}

    def rows(self, conn: Connection, values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """What it selects or returns, in the order of its columns."""
        compiled = self._for(conn)
        cursor = _raw(conn).cursor()
        cursor.execute(compiled.text, compiled.bind(values))
        found: list[tuple[Any, ...]] = cursor.fetchall()
        return [compiled.read(row) for row in found] if compiled.converted else found

    def run(self, conn: Connection, values: Mapping[str, Any]) -> int:
        """How many rows it changed."""
        compiled = self._for(conn)
        cursor = _raw(conn).cursor()
        cursor.execute(compiled.text, compiled.bind(values))
        changed: int = cursor.rowcount
        return changed

    def many(self, conn: Connection, values: Iterable[Mapping[str, Any]]) -> int:
        """Run it once for each of `values`, in one round trip; how many rows were changed in all."""
        compiled = self._for(conn)
        cursor = _raw(conn).cursor()
        return compiled.run_many(cursor, [compiled.bind(one) for one in values])

    def many_of(self, conn: Connection, values: Sequence[msgspec.Struct]) -> None:
        """Run it once for each struct, whose fields are named as what it `sets`."""
        compiled = self._for(conn)
        compiled.run_many(_raw(conn).cursor(), compiled.bind_all(values))

    def _for(self, conn: Connection) -> _Compiled:
        dialect = conn.dialect
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _Compiled(self._core, dialect, self._sets, in_order=self._in_order)
        return found


class _Compiled:
    """The text for one dialect, and what its values and columns need to pass through."""

    def __init__(self, core: Any, dialect: sa.Dialect, sets: list[str], *, in_order: bool) -> None:
        compiled = core.compile(dialect=dialect, column_keys=sets or None)
        self.text: str = compiled.string
        self._constants = {name: bind.value for bind, name in compiled.bind_names.items() if not bind.required}
        kinds = {name: bind.type.dialect_impl(dialect) for bind, name in compiled.bind_names.items()}
        names = list(compiled.positiontup) if compiled.positional else list(kinds)
        self._positional = compiled.positional
        self._names = names
        self._columns = [f"v{number}" for number in range(len(names))]
        self._pick = itemgetter(*names) if len(names) > 1 else None
        self._encode = [(name, how) for name, kind in kinds.items() if (how := kind.bind_processor(dialect))]
        self._fields: tuple[list[tuple[int, Convert]], Callable[[list[Any]], Any]] | None = None
        self.converted = _converters(core, dialect)
        at_once = dialect.name == "postgresql" and not in_order
        self._text_of_many = _of_many(self.text, kinds, dialect) if at_once else None

    def bind(self, given: Mapping[str, Any]) -> Any:
        """The values as the driver wants them."""
        values = given
        if self._constants or self._encode:
            values = {**self._constants, **given}
            for name, how in self._encode:
                values[name] = how(values[name])
        if not self._positional:
            return {name: values[name] for name in self._names}
        if self._pick is not None:
            return self._pick(values)
        return tuple(values[name] for name in self._names)

    def bind_all(self, structs: Sequence[msgspec.Struct]) -> list[Any]:
        """Many structs of one kind, always the same, as the driver wants them."""
        if self._fields is None:
            fields = structs[0].__struct_fields__
            encode = [(fields.index(name), how) for name, how in self._encode]
            self._fields = encode, itemgetter(*(fields.index(name) for name in self._names))
        encode, pick = self._fields
        bound = []
        for struct in structs:
            values = list(msgspec.structs.astuple(struct))
            for place, how in encode:
                values[place] = how(values[place])
            bound.append(pick(values))
        return bound if self._positional else [dict(zip(self._names, one, strict=True)) for one in bound]

    def run_many(self, cursor: Any, bound: Sequence[Any]) -> int:
        """Run it once for each, as one statement where that can be said; how many rows were changed in all."""
        if self._text_of_many is not None and len(bound) > 1:
            rows = [dict(zip(self._columns, one.values(), strict=True)) for one in bound]
            cursor.execute(self._text_of_many, (msgspec.json.encode(rows).decode(),))
        else:
            cursor.executemany(self.text, bound)
        changed: int = cursor.rowcount
        return changed

    def read(self, row: Sequence[Any]) -> tuple[Any, ...]:
        """A row as Python's values."""
        values = list(row)
        for number, how in self.converted:
            values[number] = how(values[number])
        return tuple(values)


def _of_many(text: str, kinds: Mapping[str, Any], dialect: sa.Dialect) -> str | None:
    """The same for many rows at once, which come as one JSON text; None where it can't be said so.

    The driver's own executemany sends, and PostgreSQL runs, as many statements as there are rows.
    """
    # On a conflict a row may come twice, which one statement refuses.
    if " ON CONFLICT " in text or any(isinstance(kind, sa.ARRAY | sa.types.NullType) for kind in kinds.values()):
        return None
    for number, name in enumerate(kinds):
        text = text.replace(f"%({name})s", f"one.v{number}")
    columns = ", ".join(f"v{number} {kind.compile(dialect)}" for number, kind in enumerate(kinds.values()))
    source = f"json_to_recordset(%s::json) AS one ({columns})"
    if text.startswith("INSERT ") and text.count(" VALUES (") == 1 and text.endswith(")"):
        head, _, row = text.partition(" VALUES (")
        return f"{head} SELECT {row[:-1]} FROM {source}"  # noqa: S608 (made of a compiled statement)
    if text.startswith("UPDATE ") and text.count(" WHERE ") == 1:
        return text.replace(" WHERE ", f" FROM {source} WHERE ")
    return None


def _converters(core: Any, dialect: sa.Dialect) -> list[tuple[int, Convert]]:
    """(column, how it is read) for those that the driver itself reads otherwise: JSON, and truth on SQLite."""
    columns = list(core.selected_columns) if isinstance(core, sa.Select) else list(getattr(core, "_returning", ()))
    kinds = [(number, column.type) for number, column in enumerate(columns)]
    ours = [(number, kind) for number, kind in kinds if isinstance(kind, sa.types.TypeDecorator | sa.Boolean)]
    found = ((number, kind.dialect_impl(dialect).result_processor(dialect, None)) for number, kind in ours)
    return [(number, how) for number, how in found if how is not None]


def _raw(conn: Connection) -> Any:
    raw = conn.connection.dbapi_connection
    assert raw is not None  # noqa: S101 (a connection that runs a transaction has one)
    return raw


class _Texts(sa.types.TypeDecorator[list[str]]):
    """A list of texts as one parameter."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> Any:
        """An array, where there are arrays."""
        kind: Any = postgresql.ARRAY(sa.Text) if dialect.name == "postgresql" else sa.Text()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: list[str] | None, dialect: sa.Dialect) -> Any:
        """JSON, where there are no arrays."""
        return value if dialect.name == "postgresql" else msgspec.json.encode(value).decode()


class any_of(sa.ColumnElement[bool]):  # noqa: N801 (reads as the function that it is to its callers)
    """`column IN (...)` with the whole list as one parameter: one text, however long the list."""

    inherit_cache = False
    type: sa.types.TypeEngine[Any] = sa.types.NullType()  # as a Boolean, SQLite would get `... = 1` after it

    def __init__(self, column: sa.ColumnElement[Any], name: str) -> None:
        self.column, self.list = column, sa.bindparam(name, type_=_Texts())


@compiles(any_of)
def _any_of(element: any_of, compiler: SQLCompiler, **kw: Any) -> str:
    column, listed = compiler.process(element.column, **kw), compiler.process(element.list, **kw)
    return f"{column} IN (SELECT value FROM json_each({listed}))"  # noqa: S608 (both are the compiler's own text)


@compiles(any_of, "postgresql")
def _any_of_array(element: any_of, compiler: SQLCompiler, **kw: Any) -> str:
    return f"{compiler.process(element.column, **kw)} = ANY({compiler.process(element.list, **kw)})"
