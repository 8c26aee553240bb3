"""results/runs.csv: one row per measurement, which counts if it is there whole."""

import sys
from collections.abc import Iterator
from pathlib import Path

from dataset import DataError
from runtime.files import write_atomically

Rows = list[dict]
REAL = "real images"  # instead of a run's name, in the rows that say what real images score
METRICS = ("accuracy", "FID", "precision", "recall", "density", "coverage")

# How each column is read. digest: see `study.Network.digest`; n: images measured; multiply_adds:
# of one forward pass for one image; test_loss, train_seconds: from the run's loss.csv; classifier:
# the start of its weights' checksum, or "earlier": one that is not in the repository.
COLUMNS = {"run": str, "model": str, "block": str, "predicts": str, "recipe": str, "digest": str,
           "seed": int, "epoch": int, "step": int, "sampling_steps": int, "guidance": float,
           "n": int, **dict.fromkeys(METRICS, float), "test_loss": float, "parameters": int,
           "multiply_adds": int, "train_seconds": float, "device": str, "torch": str, "date": str,
           "classifier": str}
HEADER = ",".join(COLUMNS)
MEASUREMENT = ("run", "digest", "epoch", "sampling_steps", "guidance", "n")  # what tells two apart
# The only columns of a row of real images.
OF_REAL = {"run", "n", *METRICS, "device", "torch", "date", "classifier"}


def read(table: Path) -> Rows:
    """The rows as dicts, empty cells as None; none if there is no such file.

    DataError, with the line, for a cell that cannot be read and for a measurement that is there
    twice, which would count as two seeds.
    """
    rows, lines = [], {}
    for number, cells in _whole(table):
        try:
            row = {name: kind(cell) if cell else None
                   for (name, kind), cell in zip(COLUMNS.items(), cells, strict=True)}
        except ValueError as error:
            raise DataError(f"{table}, line {number}: {error}") from error
        first = lines.setdefault(tuple(row[name] for name in MEASUREMENT), number)
        if first != number:
            raise DataError(f"{table}, line {number}: the same measurement as in line {first}; "
                            "delete one of them")
        rows.append(row)
    return rows


def append(table: Path, row: dict) -> None:
    """Add a row, and drop the lines that are not whole. The caller holds the table's lock."""
    lines = [HEADER, *(",".join(cells) for _, cells in _whole(table)), line(row)]
    write_atomically(table, lambda path: path.write_text("\n".join(lines) + "\n", "utf-8"))


def line(row: dict) -> str:
    """A row as it is written, without the end of the line."""
    cells = ("" if row.get(name) is None else row[name] for name in COLUMNS)
    return ",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell).replace(",", " ")
                    for cell in cells)


def _whole(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of the lines with an end and all cells. A full disk leaves others."""
    if not table.exists():
        return
    *lines, rest = table.read_text("utf-8", "replace").split("\n")
    if lines and lines[0] != HEADER:
        raise DataError(f"{table}, line 1: the columns are not those of rows.py")
    for number, text in enumerate(lines[1:], 2):
        cells = text.split(",")
        needed = OF_REAL if cells[0] == REAL else COLUMNS
        if len(cells) == len(COLUMNS) and all(cell or name not in needed
                                              for name, cell in zip(COLUMNS, cells, strict=True)):
            yield number, cells
        else:
            print(f"{table}, line {number}: not whole, so it does not count", file=sys.stderr)
    if rest:
        print(f"{table}: the last line has no end, so it does not count", file=sys.stderr)
