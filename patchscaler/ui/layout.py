"""The page: what stands where, and which event calls which handler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from patchscaler.figures import GROUP_COLORS
from patchscaler.grouping import GROUPS, PRESETS, SamplingPlan
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import compare, fragments, serving, sweeping, takehome
from patchscaler.ui.api import Endpoints
from patchscaler.ui.dials import CUSTOM, RANGES
from patchscaler.ui.handlers import Handlers
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.views import DialView, RunView

EXAMPLES = Path(__file__).parents[2] / "examples"
HEADING = """
<h1>PatchScaler</h1>
<p>Upscales a photograph four times, and spends diffusion steps only on the patches that need them.
A demo of <cite>PatchScaler: An Efficient Patch-Independent Diffusion Model for Image Super-Resolution</cite>
(Liu et al., ICCV 2025).</p>
"""
FOOTER = """
<p>The image is restored once as a whole (GRM), with a confidence for every place. Its overlapping patches are grouped
by their mean confidence: above γ₁ simple, up to γ₂ hard, medium between. Patch-DiT then refines each group from
time T in N steps, guided by textures that resemble the patch and were looked up in a reference memory.</p>
<p>This is an independent implementation. Its weights are small ones, trained from scratch for this demo; they are not
the paper's, and do not reach its quality. Fine detail is made up: it is plausible, not evidence.</p>
"""
WAITING = 16  # runs that may wait their turn: `Jobs` lets one work at a time
INSPECT = "inspect"  # what a click does, besides the groups' names
PANELS = {"coarse": "Coarse HR", "qmap": "Qmap overlay", "priors": "Texture priors", "final": "Final output"}

# Read by page.css.
COLORS = "".join(f".group-{name} {{ --group-color: {color}; }}" for name, color in zip(GROUPS, GROUP_COLORS))
# Nothing is fetched from font servers, so the page looks the same without a network.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="zinc",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
).set(body_text_color_subdued="*neutral_600", block_label_text_color="*neutral_600")


def launch_settings(jobs: Jobs) -> dict[str, Any]:
    """What `launch` is given with a page: its looks, and what keeps it safe."""
    look = {"theme": THEME, "css": COLORS, "css_paths": Path(__file__).with_name("page.css"), "footer_links": ["api"]}
    return {**serving.launch_settings(jobs), **look}


def build_page(pipeline: PatchScalerPipeline, jobs: Jobs) -> gr.Blocks:
    """The whole page over a loaded pipeline, ready for `launch(**launch_settings(jobs))`."""
    handlers = Handlers(pipeline, jobs)
    delete_cache = (sweeping.SWEEP_SECONDS, sweeping.KEPT_SECONDS)
    with gr.Blocks(title="PatchScaler", fill_width=True, delete_cache=delete_cache) as page:
        gr.HTML(HEADING, elem_id="heading")
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="controls", scale=0, min_width=320):
                image, run, stop = _input()
                preset, dials, extras = _dials()
            with gr.Column(elem_id="results", min_width=320):
                outputs = _results()
        gr.HTML(FOOTER, elem_id="footer")
        _wire(handlers, image, run, stop, preset, dials, extras, outputs)
        query = gr.Textbox(visible="hidden", show_label=False)
        page.load(
            handlers.linked,
            query,
            [preset, *dials],
            js="() => window.location.search",
            queue=False,
            preprocess=False,
            api_visibility="private",
        )
        Endpoints(handlers).publish(page, WAITING)
    return page.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)


def _input() -> tuple[gr.Image, gr.Button, gr.Button]:
    image = gr.Image(
        label="Input image",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=220,
        buttons=[],
        elem_id="input",
    )
    examples = sorted(path for path in EXAMPLES.glob("*") if path.suffix.lower() in (".png", ".jpg", ".webp"))
    if examples:
        paths = [str(path) for path in examples]
        gr.Examples(paths, image, label="Examples", elem_id="examples", api_visibility="private")
    with gr.Row():
        run = gr.Button("Run", variant="primary", min_width=100, scale=2, interactive=False, elem_id="run")
        stop = gr.Button("Stop", variant="stop", min_width=80, scale=1, interactive=False, elem_id="stop")
    return image, run, stop


def _dials() -> tuple[gr.Dropdown, list[gr.Slider | gr.Number], dict[str, Any]]:
    """Preset, dials in the order of `dials.py`, and the other settings by name."""
    plan = SamplingPlan.paper()
    preset = gr.Dropdown([*PRESETS, CUSTOM], value="paper", label="Preset", elem_id="preset")

    gammas = [
        _slider("γ₁ simple above this confidence", RANGES[0], plan.gamma1, "gamma1"),
        _slider("γ₂ hard up to this confidence", RANGES[1], plan.gamma2, "gamma2"),
    ]
    starts, steps = [], []
    for i, name in enumerate(GROUPS):
        index = "₁₂₃"[i]
        with gr.Column(elem_classes=["group", f"group-{name}"]):
            gr.HTML(f"<h3>{name.capitalize()} patches</h3>")
            with gr.Row():
                starts.append(_slider(f"Start T{index}", RANGES[2 + i], plan.start[i], f"start{i + 1}"))
                steps.append(_slider(f"Steps N{index}", RANGES[5 + i], plan.steps[i], f"steps{i + 1}"))
    with gr.Row(elem_id="seed-row"):
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=120, scale=3)
        dice = gr.Button("New seed", elem_id="dice", min_width=90, scale=1, size="sm")
    uniform = gr.Checkbox(False, label="Also render the uniform baseline (T 1000, N 20)", elem_id="uniform")
    color_fix = gr.Checkbox(True, label="Colour fix", elem_id="color-fix")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        batch = gr.Number(64, label="Patch batch: patches at once, 1 to 256", precision=0, elem_id="batch")
    budget = gr.Slider(
        0,
        60,
        60,
        step=0.1,
        label="Time budget: seconds of a full run (after the first one)",
        interactive=False,
        buttons=[],
        elem_id="budget",
    )
    extras = {"budget": budget, "dice": dice, "uniform": uniform, "color_fix": color_fix, "batch": batch}
    return preset, [*gammas, *starts, *steps, seed], extras


def _slider(label: str, limits: tuple[float, float, float], value: float, elem_id: str) -> gr.Slider:
    low, high, step = limits
    return gr.Slider(low, high, value, step=step, label=label, elem_id=elem_id, buttons=[], min_width=120)


def _results() -> dict[str, gr.Blocks]:
    """Status line, panels and timing; the names are those of RunView and DialView."""
    outputs: dict[str, Any] = {"status": gr.HTML(fragments.status(fragments.NO_IMAGE), elem_id="status")}
    captions = {
        "coarse": "Restored without diffusion",
        "priors": "Retrieved, with similarities",
        "final": "Lossless PNG, plan and seed inside",
    }
    with gr.Row(elem_id="panels"):
        for name, label in PANELS.items():
            with gr.Column(elem_classes=["stage"], min_width=0):
                outputs[name] = gr.Image(
                    label=label,
                    interactive=False,
                    # Later a click on the Qmap picks a patch, and positions are wrong in fullscreen.
                    buttons=[] if name == "qmap" else ["download", "fullscreen"],
                    elem_id=name,
                    alt_text=label,
                )
                if name == "qmap":
                    outputs["legend"] = gr.HTML(fragments.legend(), elem_id="legend")
                else:
                    gr.HTML(f'<p class="quiet">{captions[name]}</p>')
    outputs["stale"] = gr.HTML("", elem_id="stale")
    outputs["cost"] = gr.HTML("", elem_id="cost")
    with gr.Row(elem_id="clicks"):
        modes = [("Inspect it", INSPECT), *((f"Make it {name}", name) for name in GROUPS)]
        outputs["mode"] = gr.Radio(modes, value=INSPECT, label="A click on a patch of the Qmap", elem_id="mode")
        outputs["reset"] = gr.Button("Reset patches set by hand", size="sm", elem_id="reset", min_width=120, scale=0)
        outputs["seams"] = gr.Checkbox(False, label="Show patch borders", elem_id="seams", min_width=120)
    outputs["grid"] = gr.HTML("", elem_id="grid", padding=False)
    _closeups(outputs)
    gr.HTML("<h2>Time</h2>")
    outputs["histogram"] = gr.HTML("", elem_id="histogram")
    outputs["timing"] = gr.HTML(fragments.NO_TIMING, elem_id="timing")
    with gr.Row(elem_id="takehome"):
        outputs["pack"] = gr.Button("Make a ZIP of all stages", size="sm", elem_id="pack", min_width=160, scale=0)
        outputs["zip"] = gr.File(label="All stages and report.json", visible=False, interactive=False, elem_id="zip")
    outputs["baseline"] = gr.HTML("", elem_id="baseline")
    outputs["difference"] = gr.Image(
        label="Difference between final and uniform",
        alt_text="Difference between final and uniform",
        interactive=False,
        visible=False,
        buttons=["download"],
        elem_id="difference",
        height=320,
    )
    gr.HTML("<h2>Patch inspector</h2>")
    outputs["inspector"] = gr.HTML(fragments.NO_PATCH, elem_id="inspector")
    outputs["inspected"] = gr.HTML("", elem_id="inspected")
    for name, empty in (("shown", None), ("source", None), ("by_hand", {}), ("center", None), ("patch", None)):
        outputs[name] = gr.State(empty)
    return outputs


def _closeups(outputs: dict[str, Any]) -> None:
    """The before/after slider and its magnified crop."""
    gr.HTML("<h2>Before and after</h2>")
    with gr.Row(elem_id="sides"):
        outputs["left"] = gr.Dropdown(list(compare.SIDES), value="Bicubic input", label="Left", elem_id="left")
        outputs["right"] = gr.Dropdown(list(compare.SIDES), value="Final", label="Right", elem_id="right")
        outputs["factor"] = gr.Radio(list(compare.ZOOMS), value="200 %", label="Zoom", elem_id="factor")
    with gr.Row(elem_id="closeups"):
        for name, label in (("compare", "Before and after"), ("zoom", "Zoom: click a panel above to move it")):
            outputs[name] = gr.ImageSlider(
                label=label, interactive=False, buttons=[], elem_id=name, height=420, max_height=420
            )


def _wire(
    handlers: Handlers,
    image: gr.Image,
    run: gr.Button,
    stop: gr.Button,
    preset: gr.Dropdown,
    dials: list[gr.Slider | gr.Number],
    extras: dict[str, Any],
    outputs: dict[str, Any],
) -> None:
    outputs = {**outputs, "run": run, "stop": stop, "preset": preset}
    run_outputs = [outputs[name] for name in RunView._fields]
    dial_outputs = [*dials[:8], *(outputs[name] for name in DialView._fields[1:])]
    color_fix = extras["color_fix"]
    live_inputs = [image, outputs["shown"], outputs["by_hand"], color_fix, *dials]
    # Answered beside the queue, so that a full one never freezes the dials, and the last value of a drag counts.
    live: dict[str, Any] = {
        "queue": False,
        "preprocess": False,
        "trigger_mode": "always_last",
        "show_progress": "hidden",
        "api_visibility": "private",
    }

    running = run.click(
        handlers.run,
        [image, outputs["by_hand"], color_fix, extras["batch"], extras["uniform"], *dials],
        run_outputs,
        preprocess=False,
        show_progress="hidden",  # the status line tells more, and the panel shows what is finished
        concurrency_id="pipeline",
        concurrency_limit=WAITING,
        api_visibility="private",
    )
    settled = running.then(handlers.settle, [image, outputs["source"]], run_outputs, **live)
    refreshed = settled.then(handlers.refresh, live_inputs, [*dial_outputs, stop], **live)
    stop.click(handlers.stop, None, None, **live)
    image.change(handlers.new_image, image, run_outputs, **live)

    for place, dial in enumerate(dials):
        dial.input(partial(handlers.dial_moved, place), live_inputs, dial_outputs, **live)
    preset.input(handlers.preset_chosen, [preset, *live_inputs], dial_outputs, **live)
    color_fix.input(handlers.regrouped, live_inputs, dial_outputs, **live)
    rolled = extras["dice"].click(handlers.new_seed, None, dials[8], **live)
    rolled.then(handlers.regrouped, live_inputs, dial_outputs, **live)

    # Looking closely.
    sides = [image, outputs["shown"], outputs["left"], outputs["right"]]
    zoomed = [*sides, outputs["factor"], outputs["center"]]
    for event in (refreshed.then, outputs["left"].input, outputs["right"].input):
        event(handlers.compared, sides, outputs["compare"], **live)
        event(handlers.zoomed, zoomed, outputs["zoom"], **live)
    outputs["factor"].input(handlers.zoomed, zoomed, outputs["zoom"], **live)
    for panel in ("coarse", "final"):
        moved = outputs[panel].select(handlers.centered, None, outputs["center"], **live)
        moved.then(handlers.zoomed, zoomed, outputs["zoom"], **live)
    click_outputs = [outputs[name] for name in ("inspector", "patch", "center", "by_hand")]
    clicked = outputs["qmap"].select(
        handlers.clicked, [outputs["mode"], *live_inputs], [*click_outputs, *dial_outputs], **live
    )
    clicked.then(handlers.inspected, outputs["patch"], outputs["inspected"], **live)
    clicked.then(handlers.zoomed, zoomed, outputs["zoom"], **live)
    without = [image, outputs["shown"], color_fix, *dials]
    outputs["reset"].click(handlers.reset_by_hand, without, [outputs["by_hand"], *dial_outputs], **live)
    for event in (refreshed.then, outputs["seams"].input):
        event(handlers.seams, [image, outputs["seams"]], outputs["grid"], **live)

    # Budget, and what to take home.
    budget = extras["budget"]
    refreshed.then(handlers.budget_known, [image, outputs["by_hand"], *dials], budget, **live)
    budget.input(handlers.budget_set, [budget, *live_inputs], dial_outputs, **live)
    outputs["pack"].click(handlers.packed, [image, outputs["shown"]], outputs["zip"], **live)
    gr.on([dial.change for dial in dials], None, dials, None, js=takehome.LINK, **live)
