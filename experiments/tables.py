"""The tables of the report, in Markdown."""

import statistics
from collections.abc import Iterable, Sequence

from config import BLOCKS, FAMILY
from experiments.study import CURVE_IMAGES, EPOCHS, FINAL_IMAGES, GUIDED, REAL, Rows, select


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def spread(values: list[float], form: str) -> str:
    """The mean, with the range if there are several values."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def final_table(rows: Rows) -> str:
    """Every network at its end, as in the paper's Table 4."""
    lines, groups = [], {}
    for row in select(rows, recipe=None, block=None, n=FINAL_IMAGES):
        groups.setdefault((row["model"], row["block"], row["recipe"]), []).append(row)
    for names, group in sorted(groups.items(), key=lambda one: (list(FAMILY).index(one[0][0]), BLOCKS.index(one[0][1]))):
        lines.append([*names, f"{group[0]['multiply_adds'] / 1e6:.2f}", f"{group[0]['parameters'] / 1e3:.1f}",
                      str(len(group)), spread([row["FID"] for row in group], ".2f"),
                      spread([100 * row["accuracy"] for row in group], ".2f"),
                      f"{group[0]['train_seconds'] / 60:.0f}"])
    lines += [[REAL, *[""] * 5, f"{row['FID']:.2f}", f"{100 * row['accuracy']:.2f}", ""] for row in rows
              if (row["run"], row["n"]) == (REAL, FINAL_IMAGES)]
    return markdown(("model", "block", "recipe", "multiply-adds, M", "parameters, K", "seeds", "FID", "accuracy, %",
                     "minutes, first seed"), lines)


def guidance_table(rows: Rows) -> str:
    """Like the paper's Tables 2 and 3."""
    mine = [row for row in select(rows, guidance=None, seed=0) if row["model"] in GUIDED]
    mine += [row for row in rows if (row["run"], row["n"]) == (REAL, CURVE_IMAGES)]
    lines = [[row["model"] or REAL, "" if row["guidance"] is None else f"{row['guidance']:g}", f"{row['FID']:.2f}",
              f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{100 * row['accuracy']:.2f}"]
             for row in sorted(mine, key=lambda row: (row["model"] or "~", row["guidance"] or 0))]
    return markdown(("model", "guidance", "FID", "precision", "recall", "accuracy, %"), lines)


def rate_table(rows: Rows) -> str:
    """FID of the two networks whose learning rate was tried, after the epochs that all three rates have."""
    lines = [[row["model"], row["block"], row["recipe"], str(row["epoch"]), f"{row['FID']:.2f}"]
             for model, block in (("XL/4", "adaLN-Zero"), ("B/4", "in-context"))
             for recipe in ("muon-0.002", "muon", "muon-0.008")
             for row in select(rows, model=model, block=block, recipe=recipe, epoch=EPOCHS[2], seed=0)]
    return markdown(("model", "block", "recipe", "epochs", "FID"), lines)


def all_tables(rows: Rows) -> str:
    tables = {f"At the end of training, {FINAL_IMAGES:,} images": final_table,
              f"Guidance, {CURVE_IMAGES:,} images": guidance_table, f"Learning rate, {CURVE_IMAGES:,} images": rate_table}
    return "\n".join(f"## {title}\n\n{make(rows)}" for title, make in tables.items())
