"""The tables of the report, in Markdown. Most numbers that the report quotes are in them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import product

from scipy import stats

from config import BLOCKS, FAMILY, ModelConfig
from diffusion import GaussianDiffusion
from experiments import study
from experiments.crossings import crossing_lines
from experiments.fits import Line, correlation_interval, logs
from experiments.paper import TABLE_4
from experiments.rows import METRICS, REAL, Rows
from experiments.study import CURVE_IMAGES, FINAL_IMAGES, IMPOSSIBLE, PATCHES, select


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose header and lines are cells, already formatted."""
    cells = (header, ["---"] * len(header), *lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def spread(values: list[float], form: str) -> str:
    """The mean, with the range if there are several values."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def final_table(rows: Rows) -> str:
    """Every network at its end, as in the paper's Table 4."""
    lines, groups = [], {}  # a group: the seeds of one network
    for row in select(rows, recipe=None, block=None, predicts=None, n=FINAL_IMAGES):
        key = (row["model"], row["block"], row["predicts"], row["recipe"])
        groups.setdefault(key, []).append(row)

    def place(names: tuple) -> tuple[int, int]:
        return list(FAMILY).index(names[0]), BLOCKS.index(names[1])

    for names in sorted(groups, key=place):
        first, scores = groups[names][0], {name: [row[name] for row in groups[names]]
                                           for name in ("FID", "accuracy", "test_loss")}
        lines.append([*names, f"{first['multiply_adds'] / 1e6:.2f}",
                      f"{first['parameters'] / 1e3:.1f}", str(len(groups[names])),
                      spread(scores["FID"], ".2f"),
                      spread([100 * share for share in scores["accuracy"]], ".2f"),
                      spread(scores["test_loss"], ".4f"), f"{first['train_seconds'] / 60:.0f}"])
    # Real images stand for a perfect network: they have no cost.
    lines += [[REAL, *[""] * 6, f"{row['FID']:.2f}", f"{100 * row['accuracy']:.2f}", "", ""]
              for row in rows if (row["run"], row["n"]) == (REAL, FINAL_IMAGES)]
    return markdown(("model", "block", "predicts", "recipe", "multiply-adds, M", "parameters, K",
                     "seeds", "FID", "accuracy, %", "test loss", "minutes, first seed"), lines)


def guidance_table(rows: Rows) -> str:
    """Like the paper's Tables 2 and 3."""
    mine = [row for row in select(rows, guidance=None, seed=0) if row["model"] in study.GUIDED]
    mine.sort(key=lambda row: (row["model"], row["guidance"]))
    mine += [row for row in rows if (row["run"], row["n"]) == (REAL, CURVE_IMAGES)]
    lines = [[row["model"] or REAL, "" if row["guidance"] is None else f"{row['guidance']:g}",
              f"{row['FID']:.2f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}",
              f"{100 * row['accuracy']:.2f}"] for row in mine]
    return markdown(("model", "guidance", "FID", "precision", "recall", "accuracy, %"), lines)


def rate_table(rows: Rows) -> str:
    """The networks whose learning rate was tried, after the epochs that all their rates have."""
    lines = [[row["model"], row["block"], row["recipe"], str(row["epoch"]), f"{row['FID']:.2f}"]
             for model, block in (("XL/4", "adaLN-Zero"), *(("B/4", block) for block in BLOCKS[:3]))
             for recipe in ("muon-0.002", "muon", "muon-0.008")
             for row in select(rows, model=model, block=block, recipe=recipe,
                               epoch=study.EPOCHS[2], seed=0)]
    return markdown(("model", "block", "recipe", "epochs", "FID"), lines)


def noise_table(rows: Rows) -> str:
    """How far seeds scatter log FID, over all networks with several seeds."""
    groups = {}
    for row in select(rows, block=None, n=FINAL_IMAGES):
        groups.setdefault((row["model"], row["block"]), []).append(math.log(row["FID"]))
    groups = [group for group in groups.values() if len(group) > 1]
    dof = sum(len(group) - 1 for group in groups)
    if not dof:
        return markdown(("standard deviation of log FID",), [])
    # Pooled over the networks. A difference of two runs has sqrt(2) times as much.
    deviation = math.sqrt(sum(statistics.variance(group) * (len(group) - 1)
                              for group in groups) / dof)
    least = math.exp(stats.t.ppf(0.975, dof) * math.sqrt(2) * deviation) - 1
    return markdown(("networks", "standard deviation of log FID", "degrees of freedom",
                     "two single runs differ at the 5% level from"),
                    [(str(len(groups)), f"{deviation:.3f}", str(dof), f"{100 * least:.0f}%")])


def paired(ends: dict[tuple[str, int], dict], pairs: Iterable[tuple[str, str]]) -> str:
    """Differences of two groups with equal seeds, and whether the seeds explain them.

    ends: the row of each (group, seed).
    """
    lines = []
    for a, b in pairs:
        seeds = [seed for name, seed in ends if name == a and (b, seed) in ends]
        for column, form in (("FID", "+.2f"), ("test_loss", "+.4f")):
            differences = [ends[a, seed][column] - ends[b, seed][column] for seed in seeds]
            if len(set(differences)) > 1:
                t, p = stats.ttest_1samp(differences, 0)
                lines.append((f"{a} - {b}", column.replace("_", " "),
                              ", ".join(f"{value:{form}}" for value in differences),
                              f"{statistics.mean(differences):{form}}", f"{t:.1f}", f"{p:.3f}"))
    return markdown(("pair", "of", "by seed", "mean", "t", "p"), lines)


def design_table(rows: Rows) -> str:
    """Figure 5: pairs of designs."""
    parts = "adaLN, zero", "adaLN-Zero, gate-1", "adaLN-Zero, xavier"  # see starts.py
    ends = {(", ".join([row["block"], *row["recipe"].split("-", 1)[1:]]), row["seed"]): row
            for row in select(rows, model="B/4", block=None, recipe=None, n=FINAL_IMAGES)
            if row["recipe"].startswith("muon")}
    return paired(ends, (("in-context", "adaLN"), ("cross-attention", "adaLN"),
                         ("in-context", "cross-attention"),
                         *((a, "adaLN-Zero") for a in BLOCKS[:3]),
                         *product(parts, ("adaLN", "adaLN-Zero")), parts[:2]))


def target_table(rows: Rows) -> str:
    """What the output is read as: x_0 and v, each against eps."""
    ends = {(f"{row['model']}, {row['predicts']}", row["seed"]): row
            for row in select(rows, predicts=None, n=FINAL_IMAGES)}
    return paired(ends, ((f"{model}, {target}", f"{model}, eps")
                         for model in FAMILY for target in ("x_0", "v")))


def fit_table(rows: Rows) -> str:
    """Figure 8: FID = a flops^b, then FID = a flops^b parameters^c, ours and the paper's."""
    ours = study.at_the_end(rows, "multiply_adds", "parameters", "FID")
    lines = []
    for whose, of_all in (("ours", ours), ("the paper's", TABLE_4)):
        large = [values for name, values in of_all.items() if not name.endswith("/2")]
        for which, models in ((whose, list(of_all.values())), (f"{whose}, no patches of 2", large)):
            if len(models) < 5:
                continue
            flops, parameters, fid = (logs(column) for column in zip(*models, strict=True))
            r, *interval = correlation_interval(flops, fid)
            alone, both = Line(fid, flops), Line(fid, flops, parameters)
            lines.append((which, str(len(models)), with_interval(r, interval),
                          with_interval(alone.coefficient(1)[0], alone.interval(1)),
                          *("{:+.2f} ± {:.2f}".format(*both.coefficient(i)) for i in (1, 2)),
                          f"{statistics.correlation(parameters, fid):.2f}"))
    return markdown(("models", "number", "correlation of log FID and log flops",
                     "flops alone: exponent", "with parameters: of flops", "of parameters",
                     "correlation of log FID and log parameters"), lines)


def metric_table(rows: Rows) -> str:
    """Figure 12: each metric at the end against log flops."""
    lines = []
    for name in (*METRICS, "test_loss"):
        models = list(study.at_the_end(rows, "multiply_adds", name).values())
        if len(models) > 4:
            flops, scores = zip(*models, strict=True)
            r, *interval = correlation_interval(logs(flops), scores)
            lines.append((name.replace("_", " "), with_interval(r, interval)))
    return markdown(("metric", "correlation with log flops"), lines)


def sampling_table(rows: Rows) -> str:
    """Figure 10: FID of each model by the number of sampling steps."""
    found = {(row["model"], row["sampling_steps"]): f"{row['FID']:.2f}"
             for row in select(rows, sampling_steps=None, seed=0)}
    lines = [(name, *(found.get((name, steps), "") for steps in study.SAMPLING_STEPS))
             for name in FAMILY if any(model == name for model, _ in found)]
    return markdown(("model", *map(str, study.SAMPLING_STEPS)), lines)


def loss_table(rows: Rows) -> str:
    """Figure 13: whether the test loss tells FID, over all points of the curves."""
    lines = []
    for patch in (*PATCHES, None):
        mine = [row for row in select(rows, epoch=None) if row["model"] != IMPOSSIBLE
                and patch in (None, FAMILY[row["model"]].patch_size)]
        if len(mine) > 4:
            losses, fids = ([row[name] for row in mine] for name in ("test_loss", "FID"))
            lines.append((str(patch or "all"), str(len(mine)),
                          f"{statistics.correlation(logs(losses), logs(fids)):.2f}"))
    return markdown(("patch", "measurements", "correlation of log test loss and log FID"), lines)


def least_loss(config: ModelConfig) -> float:
    """No squared error can be less, at any t, when a token is narrower than its patch.

    The last LayerNorm removes a token's mean, so for given t and y its output lies in an affine
    space of hidden_size - 1 dimensions. The noise in the others is lost.
    """
    values = config.patch_size**2 * config.in_channels
    return max(0.0, 1 - (config.hidden_size - 1) / values)


def loss_bound_table(rows: Rows) -> str:
    mine = sorted(select(rows, model=IMPOSSIBLE, n=FINAL_IMAGES), key=lambda row: row["seed"])
    losses = ", ".join(f"{row['test_loss']:.3f}" for row in mine)
    return markdown(("model", "least possible loss", "test loss, by seed"),
                    [(IMPOSSIBLE, f"{least_loss(FAMILY[IMPOSSIBLE]):.3f}", losses)])


def weight_table(rows: Rows) -> str:
    """How much of the loss's weight min-SNR leaves to t < 300."""
    alpha_bar = GaussianDiffusion().alpha_bar
    snr = alpha_bar / (1 - alpha_bar)
    weights = {gamma: snr.clamp(max=gamma) / snr for gamma in (study.RECIPE.min_snr, 1.0, 5.0)}
    return markdown(("gamma", "weight of t < 300"),
                    [(f"{gamma:g}", f"{100 * weight[:300].sum() / weight.sum():.0f}%")
                     for gamma, weight in weights.items()])


def crossing_table(rows: Rows) -> str:
    """Figure 9."""
    return markdown(("smaller", "larger", "meet at", "FID there", "pairs of seeds that meet",
                     "smaller ends at", "its FID", "FID of the larger there"), crossing_lines(rows))


def all_tables(rows: Rows) -> str:
    tables = {f"At the end of training, {FINAL_IMAGES:,} images": final_table,
              "Noise of the seeds at the end": noise_table,
              "Figure 5: pairs of designs at the end": design_table,
              "Figure 8: FID against flops and parameters": fit_table,
              f"Figure 9: equal training compute in multiply-adds, {CURVE_IMAGES:,} images":
              crossing_table,
              f"Figure 10: FID by sampling steps, {CURVE_IMAGES:,} images": sampling_table,
              f"Figure 12: metrics at the end, {FINAL_IMAGES:,} images": metric_table,
              "Figure 13: test loss and FID": loss_table,
              "Predicting x_0 or v instead of eps, at the end": target_table,
              "S/7's bound": loss_bound_table,
              f"Guidance, {CURVE_IMAGES:,} images": guidance_table,
              f"Learning rate, {CURVE_IMAGES:,} images": rate_table,
              "min-SNR": weight_table}
    return "\n".join(f"## {title}\n\n{make(rows)}" for title, make in tables.items())
