"""The paper's tables by name; a new table is a new file here and one more name in TABLES."""

from __future__ import annotations

import types
from collections.abc import Mapping

from cosa.config import nearest
from sweeps.tables import table_3a, table_3b
from sweeps.tables.table import Arm, Table

TABLES: Mapping[str, Table] = types.MappingProxyType(
    {table.name: table for table in (table_3a.TABLE, table_3b.TABLE)}
)

__all__ = ["TABLES", "Arm", "Table", "get_table"]


def get_table(name: str) -> Table:
    """The table called `name`.

    Raises:
        ValueError: There is none of that name; the nearest one is suggested.
    """
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}{nearest(name, TABLES)}")
    return TABLES[name]
