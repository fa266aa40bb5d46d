"""Figure 6 of the paper on any weights: what later starts and fewer steps save, and what they cost.

python -m patchscaler sweep --lr DIR --hr DIR -o OUT
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from patchscaler.evaluation import outputs
from patchscaler.evaluation.pairs import (
    MEASURES,
    Pair,
    add_options,
    analyses,
    coarse_costs,
    costs,
    describe_setup,
    measure_pairs,
    score,
)
from patchscaler.evaluation.scores import find_scorer
from patchscaler.evaluation.tables import HEADINGS, mean_of, means_table
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import SamplingPlan

PAPER, UNIFORM = SamplingPlan.paper(), SamplingPlan.uniform()
KEYS = ("feature_distance", "haarpsi", "mdsi", "psnr_y")
COLUMNS = ("image", "start", "steps", *KEYS, "evaluations", "seconds")

# The paper first lets simple and medium patches start later, at 20 steps each, then takes steps from them at the
# starts it has found; each goes on below its choice. It names the ends and its choice, the ones between are ours.
STARTS = tuple(
    replace(UNIFORM, start=start)
    for start in (
        (1000, 1000, 1000),
        (800, 900, 1000),
        (600, 800, 1000),
        (400, 700, 1000),
        (300, 550, 800),
        (200, 400, 600),
        (100, 200, 400),
    )
)
STEPS = tuple(
    replace(PAPER, steps=steps)
    for steps in (
        (20, 20, 20),
        (16, 18, 20),
        (12, 16, 20),
        (8, 14, 20),
        (6, 10, 14),
        (4, 7, 10),
        (4, 4, 4),
        (2, 2, 2),
        (1, 1, 1),
    )
)
PLANS = tuple(dict.fromkeys(STARTS + STEPS))  # the one in both only once


def sweep(
    pipeline: PatchScalerPipeline, pairs: Sequence[Pair], out: Path, seed: int = 0, batch_size: int | None = None
) -> str:
    """Run all PLANS on the first image of each pair, which is analysed once, and compare them with the second.

    `sweep.csv` has a line for each image and plan, and one for its coarse image, with no start and no steps;
    seconds are those of a whole run, analysis and all. `sweep.png` shows the means, `sweep.md` is the returned
    Markdown. ImageError names an image that is unreadable, too small to be scored, or not four times its input.
    """
    out.mkdir(parents=True, exist_ok=True)
    scorer = find_scorer(pipeline.device, KEYS)
    rows: dict[SamplingPlan | None, list[dict]] = {plan: [] for plan in (None, *PLANS)}
    with open(out / "sweep.csv", "w", buffering=1, newline="", encoding="utf-8") as file:  # by lines, to follow it
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (name, analysis, truth) in enumerate(analyses(pipeline, pairs, batch_size)):
            if number == 0:  # what a device does only once is not to count against the first plan
                [*pipeline.refine(analysis, PLANS[-1], seed, batch_size)]
            coarse = score(scorer, name, analysis.coarse, truth)
            rows[None].append({"image": name, **coarse_costs(analysis), **coarse})
            for plan in PLANS:
                *_, result = pipeline.refine(analysis, plan, seed, batch_size)
                names = {"image": name, "start": _three(plan.start), "steps": _three(plan.steps)}
                rows[plan].append(names | costs(result) | score(scorer, name, result.picture.rgb, truth))
            writer.writerows(own[-1] for own in rows.values())
    named = {f"T {_three(plan.start)}, N {_three(plan.steps)}" if plan else "coarse": rows[plan] for plan in rows}
    lines = ["# Sweep", "", describe_setup(pipeline, pairs, seed), "", *means_table(named, "plan, mean of"), ""]
    summary = "\n".join([*lines, *scorer.skipped_lines()]).rstrip() + "\n"
    (out / "sweep.md").write_text(summary, encoding="utf-8")
    _plot(rows, [metric.key for metric in scorer.scores], out / "sweep.png")
    return summary


def _three(values: tuple[int, int, int]) -> str:
    return " ".join(map(str, values))


def _plot(rows: dict[SamplingPlan | None, list[dict]], keys: list[str], path: Path) -> None:
    """Means of each measure: over the starts, which cost all the same, and over the seconds that the steps cost."""
    from matplotlib.figure import Figure  # here, because `upscale` starts without it

    figure = Figure(figsize=(4.8 * len(keys), 7.4), layout="constrained")
    for key, (over_starts, over_seconds) in zip(keys, figure.subplots(2, len(keys), squeeze=False, sharey="col").T):
        values = [mean_of(rows[plan], key) for plan in STARTS]
        over_starts.plot([_three(plan.start) for plan in STARTS], values, "o-", color="#0a9396")
        over_starts.tick_params("x", rotation=30, labelsize=7)
        over_starts.set_xlabel("start times, at 20 steps each")
        points = [(mean_of(rows[plan], "seconds"), mean_of(rows[plan], key)) for plan in STEPS]
        over_seconds.plot(*zip(*points), "s-", color="#c2185b")
        for plan, point in zip(STEPS, points):
            over_seconds.annotate(
                _three(plan.steps), point, (0, 6), textcoords="offset points", fontsize=7, rotation=60
            )
        over_seconds.plot(*points[STEPS.index(PAPER)], "*", color="black", ms=13, label="paper")
        over_seconds.set_xlabel("seconds per image, starts 400 700 1000, steps as written")
        over_seconds.margins(0.1, 0.2)
        for axes in (over_starts, over_seconds):
            axes.axhline(mean_of(rows[None], key), color="#64748b", linestyle=":", label="coarse")
            axes.set_ylabel(HEADINGS[key][0])
    figure.axes[len(keys)].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata=outputs.PNG_TEXT)


def add_command(commands: argparse._SubParsersAction) -> None:
    """The command `sweep`."""
    parser = commands.add_parser("sweep", help="measures against cost over start times and steps (Figure 6)")
    parser.set_defaults(run=run)
    outputs.add_options(parser, "sweep.csv, sweep.md and sweep.png")
    add_options(parser)


def marks(pairs: Sequence[Pair]) -> dict[str, str]:
    """The files that `sweep` writes, as `outputs.prepare` takes them."""
    return {"sweep.csv": ",".join(COLUMNS), "sweep.md": MEASURES, "sweep.png": outputs.PNG_MARK}


def run(args: argparse.Namespace) -> int:
    return measure_pairs(args, sweep, marks, out=args.out)
