"""The page: what stands where, and which event calls which handler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from patchscaler.figures import GROUP_COLORS
from patchscaler.grouping import GROUPS, PRESETS, SamplingPlan
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import fragments
from patchscaler.ui.api import upscale_endpoint
from patchscaler.ui.dials import CUSTOM, RANGES
from patchscaler.ui.handlers import DialView, Handlers, RunView

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
LAUNCH: dict[str, Any] = {
    "max_file_size": "20mb",
    "allowed_paths": [],
    "show_error": False,
    "enable_monitoring": False,
    "strict_cors": True,
    "ssr_mode": False,
    "mcp_server": False,
    "run_history": False,
    "state_session_capacity": 200,
    "footer_links": ["api"],
    "theme": THEME,
    "css": COLORS,
    "css_paths": Path(__file__).with_name("page.css"),
}


def build_page(pipeline: PatchScalerPipeline) -> gr.Blocks:
    """The whole page over a loaded pipeline, ready for `launch(**LAUNCH)`."""
    handlers = Handlers(pipeline)
    with gr.Blocks(title="PatchScaler", fill_width=True, delete_cache=(600, 3600)) as page:
        gr.HTML(HEADING, elem_id="heading")
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="controls", scale=0, min_width=320):
                image, run, stop = _input()
                preset, dials = _dials()
            with gr.Column(elem_id="results", min_width=320):
                outputs = _results()
        gr.HTML(FOOTER, elem_id="footer")
        _wire(handlers, image, run, stop, preset, dials, outputs)
        gr.api(upscale_endpoint(handlers), api_name="upscale", concurrency_id="pipeline", concurrency_limit=WAITING)
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
        gr.Examples([str(path) for path in examples], image, label="Examples", elem_id="examples")
    with gr.Row():
        run = gr.Button("Run", variant="primary", min_width=100, scale=2, interactive=False, elem_id="run")
        stop = gr.Button("Stop", variant="stop", min_width=80, scale=1, interactive=False, elem_id="stop")
    return image, run, stop


def _dials() -> tuple[gr.Dropdown, list[gr.Slider | gr.Number]]:
    """Preset and dials, these in the order of `dials.py`."""
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
    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    return preset, [*gammas, *starts, *steps, seed]


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
    outputs["timing"] = gr.HTML(fragments.NO_TIMING, elem_id="timing")
    outputs["shown"] = gr.State(None)
    outputs["source"] = gr.State(None)
    return outputs


def _wire(
    handlers: Handlers,
    image: gr.Image,
    run: gr.Button,
    stop: gr.Button,
    preset: gr.Dropdown,
    dials: list[gr.Slider | gr.Number],
    outputs: dict[str, Any],
) -> None:
    outputs = {**outputs, "run": run, "stop": stop, "preset": preset}
    run_outputs = [outputs[name] for name in RunView._fields]
    dial_outputs = [*dials[:8], *(outputs[name] for name in DialView._fields[1:])]
    live_inputs = [image, outputs["shown"], *dials]
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
        [image, *dials],
        run_outputs,
        preprocess=False,
        show_progress_on=outputs["final"],
        concurrency_id="pipeline",
        concurrency_limit=WAITING,
        api_visibility="private",
    )
    settled = running.then(handlers.settle, [image, outputs["source"]], run_outputs, **live)
    settled.then(handlers.refresh, live_inputs, [*dial_outputs, stop], **live)
    stop.click(handlers.stop, None, None, **live)
    image.change(handlers.new_image, image, run_outputs, **live)

    for place, dial in enumerate(dials):
        dial.input(partial(handlers.dial_moved, place), live_inputs, dial_outputs, **live)
    preset.input(handlers.preset_chosen, [preset, *live_inputs], dial_outputs, **live)
