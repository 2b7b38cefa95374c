"""Lines of JSON that a user has, and lines of tables that come back."""

import json
import re
from pathlib import Path


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cells(line: str) -> list[str]:
    """The columns of a table's line, which two spaces part."""
    return re.split(r" {2,}", line.strip())


def table(out: str) -> dict[str, str]:
    """The second column by the first, of a table with two."""
    return {row[0]: row[-1] for row in map(cells, out.splitlines())}
