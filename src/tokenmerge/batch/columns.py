"""Which images a table holds: by a column of bytes, or of paths and URLs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenmerge.batch.places import Place, beside, open_table, reason_of
from tokenmerge.errors import DataError, TokenMergeError, unknown_name

__all__ = ["rows_of"]

_COLUMNS = ("image", "path", "file", "filename", "file_name", "url")


def rows_of(path: str, called: str, image: str | None, ids: str | None) -> Iterator[tuple[str, Place]]:
    """Yield id and place of every row of a file of Parquet or Arrow, which ids without a column `ids` name `called`.

    `image` names the column of images, or of their paths. Raises `DataError` for a file that cannot be read or that
    does not say which column holds images or lacks an id, `UnknownNameError` for a column that is not there.
    """
    count = 0
    try:
        with open_table(path) as (schema, groups, read):
            column = _column(schema, image, path)
            if ids is not None and ids not in schema.names:
                raise unknown_name(f"column of {path}", ids, schema.names)
            is_text = _holds_paths(schema.field(column).type)
            wanted = list(dict.fromkeys([*([column] if is_text else []), *([ids] if ids else [])]))
            for group, rows in enumerate(groups):
                table = read(group, wanted) if wanted else None
                names = table[ids].to_pylist() if table is not None and ids else None
                paths = table[column].to_pylist() if table is not None and is_text else None
                for row in range(rows):
                    name = f"{called}#{count}" if names is None else _id(names[row], ids or "", count, path)
                    count += 1
                    cell = Place(path, row=(group, row), column=column)
                    yield name, cell if paths is None else beside(paths[row], path)
    except TokenMergeError:
        raise
    except Exception as error:  # of Arrow, or of the file system
        raise DataError(f"cannot read {path}: {reason_of(error)}") from error


def _id(value: Any, column: str, row: int, path: str) -> str:
    if value is None:
        raise DataError(
            f"row {row} of {path} has no id in its column {column}: give another --id-column, or none (an id is then "
            "FILE#ROW)."
        )
    # some tools write texts as bytes
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _holds_paths(kind: Any) -> bool:
    return _named(kind) in ("string", "large_string", "string_view")


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields))
    return _named(kind) in ("binary", "large_binary", "binary_view")


def _named(kind: Any) -> str:
    """Return the name of a type; of one whose values are numbered (pandas' categories), that of the values."""
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _column(schema: Any, image: str | None, path: str) -> str:
    """Return the column of images: the one named, else the only one of bytes, else one with a usual name."""
    if image is not None and image not in schema.names:
        raise unknown_name(f"column of {path}", image, schema.names)
    fitting = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in _COLUMNS if name in schema.names and _holds_paths(schema.field(name).type)]
    chosen = image or (fitting[0] if len(fitting) == 1 else named[0] if not fitting and named else None)
    if chosen is None or not (_holds_images(schema.field(chosen).type) or _holds_paths(schema.field(chosen).type)):
        raise DataError(
            f"which column of {path} are the images? It has {', '.join(f'{one.name} ({one.type})' for one in schema)}: "
            "give one of bytes, or of paths, by --image-column."
        )
    return chosen
