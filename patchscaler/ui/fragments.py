"""Small pieces of the page's HTML. Every text that comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from patchscaler.figures import GROUP_COLORS
from patchscaler.grouping import GROUPS, SamplingPlan
from patchscaler.pipeline import Progress, Result

NO_IMAGE = "Upload an image or choose an example, then press Run."
NO_TIMING = '<p class="quiet">The seconds of every group and stage appear here after a run.</p>'
STAGES = (
    ("encode", "Encode"),
    ("restore", "Restore (GRM)"),
    ("retrieve", "Retrieve priors"),
    ("refine", "Refine"),
    ("decode", "Decode"),
    ("color", "Colour fix"),
)


def status(text: str, done: int = 0, total: int = 0) -> str:
    bar = f'<progress aria-label="Network evaluations" value="{done}" max="{total}"></progress>' if total else ""
    return f"<p>{escape(text)}</p>{bar}"


def step(progress: Progress) -> str:
    """What a progress event says, for the status line."""
    group = GROUPS[progress.group].capitalize()
    return f"{group}: step {progress.step} of {progress.steps}, {_patches(progress.patches)}"


def legend(counts: Sequence[int] = ()) -> str:
    """The groups' colours, with the patches in each once they are known."""
    entries = []
    for i, name in enumerate(GROUPS):
        count = f" <b>{counts[i]}</b>" if counts else ""
        entries.append(f'<li data-group="{name}">{_swatch(i)}{name.capitalize()}{count}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def cost(plan: SamplingPlan, counts: Sequence[int], width: int, height: int) -> str:
    """What a run with `plan` will do, against every patch treated as hard at T 1000, N 20."""
    evaluations = plan.evaluations(counts)
    share = evaluations / SamplingPlan.uniform().evaluations(counts)
    return (
        f"<p>{width} × {height} pixels, {_patches(sum(counts))}, <b>{evaluations:,}</b> network evaluations: "
        f"{share:.0%} of uniform sampling.</p>"
    )


def stale(made_with: SamplingPlan, seed: int, changed: int, patches: int) -> str:
    """Says that the final picture belongs to an older plan."""
    return (
        f'<p class="stale">The final picture was made with an older plan: {escape(describe(made_with, seed))}. '
        f"With the dials as they are, {changed} of {_patches(patches)} would change.</p>"
    )


def describe(plan: SamplingPlan, seed: int) -> str:
    start, steps = ("/".join(map(str, values)) for values in (plan.start, plan.steps))
    return f"γ {plan.gamma1:.2f}/{plan.gamma2:.2f}, T {start}, N {steps}, seed {seed}"


def timing(result: Result, reused: bool) -> str:
    """Two tables: each group's work, and the seconds of every stage. `reused`: the analysis is an earlier run's."""
    rows = "".join(
        f'<tr><th scope="row">{_swatch(i)}{group.name.capitalize()}</th><td>{group.patches}</td><td>{group.start}</td>'
        f"<td>{group.steps}</td><td>{group.evaluations:,}</td><td>{group.seconds:.2f}</td></tr>"
        for i, group in enumerate(result.groups)
    )
    totals = [sum(getattr(group, name) for group in result.groups) for name in ("patches", "evaluations", "seconds")]
    stages = "".join(
        f'<tr><th scope="row">{label}</th><td>{result.seconds[name]:.2f}{_note(name, reused)}</td></tr>'
        for name, label in STAGES
    )
    return (
        '<div class="tables"><table class="groups"><caption>Groups</caption><thead><tr>'
        '<th scope="col">Group</th><th scope="col">Patches</th><th scope="col">T</th><th scope="col">N</th>'
        '<th scope="col">Network evaluations</th><th scope="col">Seconds</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><th scope="row">All</th><td>{totals[0]}</td><td></td><td></td>'
        f"<td>{totals[1]:,}</td><td>{totals[2]:.2f}</td></tr></tfoot></table>"
        '<table class="stages"><caption>Stages</caption><thead><tr><th scope="col">Stage</th>'
        f'<th scope="col">Seconds</th></tr></thead><tbody>{stages}</tbody></table></div>'
    )


def _note(stage: str, reused: bool) -> str:
    return ' <span class="quiet">reused</span>' if reused and stage in ("encode", "restore", "retrieve") else ""


def _swatch(group: int) -> str:
    return f'<span class="swatch" style="background:{GROUP_COLORS[group]}"></span>'


def _patches(count: int) -> str:
    return f"{count:,} patch" if count == 1 else f"{count:,} patches"
