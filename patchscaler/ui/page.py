"""The page: what stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from patchscaler.figures import GROUP_COLORS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.ui import closeup, events, html, server
from patchscaler.ui.api import Endpoints
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.run import Runner, emptied
from patchscaler.ui.state import CUSTOM, INSPECT, RANGES, PageState, View

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESET_NAMES = {"paper": "Paper", "fast": "Fast", "balanced": "Balanced", "uniform": "Uniform 20", CUSTOM: "Custom"}


def _input(view: View) -> None:
    """The image, and the buttons that have it upscaled."""
    image = gr.Image(
        label="Input image",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=170,
        buttons=[],
        elem_id="input",
        alt_text="Input image",
    )
    gr.HTML(view["note"], elem_id="note")
    paths = [str(path) for path in example_files()]
    gr.Examples(paths, image, label="Examples", elem_id="examples", api_visibility="private")
    with gr.Column(elem_id="go", min_width=0):
        with gr.Row():
            ready = view["run"]["interactive"]
            gr.Button("Run", variant="primary", min_width=100, scale=2, interactive=ready, elem_id="run")
            gr.Button("Stop", variant="stop", min_width=80, scale=1, interactive=False, elem_id="stop")
        gr.HTML(view["cost"], elem_id="cost")


def _plan() -> None:
    """What a run is to do."""
    plan = SamplingPlan.paper()
    choices = [(label, name) for name, label in PRESET_NAMES.items()]
    gr.Dropdown(choices, value="paper", label="Preset", elem_id="preset")
    few = "With the repository's weights Fast looks the same: 0.8 s instead of 2.1 s for 680×680 pixels on two cores."
    gr.HTML(f'<p class="quiet">{few}</p>')
    _slider("γ₁ simple above confidence", RANGES[0], plan.gamma1, "gamma1")
    _slider("γ₂ hard up to confidence", RANGES[1], plan.gamma2, "gamma2")
    for i, name in enumerate(GROUPS):
        index = "₁₂₃"[i]
        with gr.Column(elem_classes=["group", f"group-{name}"]):
            gr.HTML(f"<h2>{name.capitalize()} patches</h2>")
            with gr.Row():
                _slider(f"Start T{index}", RANGES[2 + i], plan.start[i], f"start{i + 1}")
                _slider(f"Steps N{index}", RANGES[5 + i], plan.steps[i], f"steps{i + 1}")
    with gr.Row(elem_id="seed-row"):
        gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=120, scale=3)
        gr.Button("⚄ New seed", elem_id="dice", min_width=100, scale=1, size="sm")
    label = "Budget: seconds of a full run"
    gr.Slider(0, 60, 60, step=0.01, label=label, interactive=False, buttons=[], elem_id="budget")
    gr.Checkbox(False, label="Uniform baseline too (T 1000, N 20)", elem_id="uniform")
    info = "Colours of the input. Off: those of the refined patches as they are decoded."
    gr.Checkbox(True, label="Colour fix", info=info, elem_id="color-fix")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        label = "Patch batch: patches at once, 1 to 256. Empty: what suits the device"
        gr.Number(None, label=label, precision=0, elem_id="batch")


def _slider(label: str, limits: tuple[float, float, float], value: float, elem_id: str) -> None:
    low, high, step = limits
    gr.Slider(low, high, value, step=step, label=label, elem_id=elem_id, buttons=[], min_width=120)


def example_files() -> list[Path]:
    return sorted(path for path in EXAMPLES.glob("*") if path.suffix.lower() in (".png", ".jpg", ".webp"))


PANELS = {"coarse": "Coarse HR", "qmap": "Qmap overlay", "priors": "Texture priors", "final": "Final output"}
CAPTIONS = {
    "coarse": "Restored without diffusion",
    "priors": "Retrieved, with similarities",
    "final": "Lossless PNG, plan and seed inside",
}


def _results(view: View) -> None:
    """For one image: what the method made of it, and how."""
    gr.HTML(view["status"], elem_id="status")
    with gr.Row(elem_id="panels"):
        for name, label in PANELS.items():
            with gr.Column(elem_classes=["stage"], min_width=0):
                gr.Image(
                    view[name],
                    label=label,
                    interactive=False,
                    # A click on the Qmap picks a patch, and positions are wrong in fullscreen.
                    buttons=[] if name == "qmap" else ["download", "fullscreen"],
                    elem_id=name,
                    alt_text=label,
                )
                if name == "qmap":
                    gr.HTML(view["legend"], elem_id="legend")
                else:
                    gr.HTML(f'<p class="quiet">{CAPTIONS[name]}</p>')
    gr.HTML("", elem_id="stale")
    with gr.Row(elem_id="groups"):
        gr.HTML(view["histogram"], elem_id="histogram")
        _by_hand()
    gr.HTML("", elem_id="grid", padding=False)
    _closeups(view)
    _timing(view)
    gr.HTML("<h2>Patch inspector</h2>")
    gr.HTML(html.NO_PATCH, elem_id="inspector")
    gr.HTML("", elem_id="inspected")


def _by_hand() -> None:
    """What a click or a stroke on the Qmap does."""
    modes = [("Inspect", INSPECT), *((f"Make {name}", name) for name in GROUPS)]
    with gr.Column(elem_id="hand", min_width=280):
        label = "Click a patch of the Qmap, or draw over several, to…"
        gr.Radio(modes, value=INSPECT, label=label, elem_id="mode")
        with gr.Row(elem_id="hand-row"):
            gr.Number(None, label="Patch", precision=0, elem_id="number", min_width=100, minimum=0)
            gr.Button("Reset hand-set patches", size="sm", elem_id="reset", min_width=100)
            gr.Checkbox(False, label="Patch borders", elem_id="seams", min_width=120)
        gr.HTML("", elem_id="facts")
        gr.Button("Stroke", visible="hidden", elem_id="stroke")  # pressed by page.js


def _closeups(view: View) -> None:
    """The before/after slider and its magnified crop."""
    gr.HTML("<h2>Before and after</h2>")
    with gr.Row(elem_id="sides"):
        gr.Dropdown(list(closeup.SIDES), value=closeup.LEFT, label="Left", elem_id="left")
        gr.Dropdown(list(closeup.SIDES), value=closeup.RIGHT, label="Right", elem_id="right")
        gr.Radio(list(closeup.ZOOMS), value=closeup.ZOOM, label="Zoom", elem_id="factor")
    gr.HTML("", elem_id="no-side")
    with gr.Row(elem_id="closeups"):
        for name, label in (("compare", "Before and after"), ("zoom", "Zoom: click a panel above to move it")):
            gr.ImageSlider(
                view[name], label=label, interactive=False, buttons=[], elem_id=name, height=420, max_height=420
            )


def _timing(view: View) -> None:
    """Where the seconds went, what uniform sampling would cost more, and the export."""
    gr.HTML("<h2>Time</h2>")
    gr.HTML(view["timing"], elem_id="timing")
    gr.HTML("", elem_id="baseline")
    gr.Image(
        label="Difference between final and uniform",
        alt_text="Difference between final and uniform",
        interactive=False,
        visible=False,
        buttons=["download"],
        elem_id="difference",
        height=320,
    )
    with gr.Row(elem_id="export"):
        gr.Button("Make a ZIP of all stages", size="sm", elem_id="pack", min_width=160, scale=0)
        gr.File(label="All stages and report.json", visible=False, interactive=False, elem_id="zip")


def _batch() -> None:
    """For several images."""
    label = f"Images, up to {server.MAX_FILES}"
    gr.File(label=label, file_count="multiple", file_types=["image"], elem_id="files", height=180)
    with gr.Row():
        gr.Button("Run all", variant="primary", min_width=100, scale=2, elem_id="run-all")
        gr.Button("Stop", variant="stop", min_width=80, scale=1, interactive=False, elem_id="stop-all")
    gr.HTML(html.status(NO_FILES), elem_id="batch-status")
    gr.HTML("", elem_id="outcomes")
    gr.Gallery(
        label="Upscaled", interactive=False, columns=3, object_fit="contain", buttons=["fullscreen"], elem_id="gallery"
    )
    gr.File(label="All as lossless PNGs, and report.json", interactive=False, elem_id="batch-zip")


NO_FILES = "Choose some images, then press Run all. All are upscaled with the settings of the page's first column."
# A picture of patches in the groups' colours.
LOGO = "".join(
    f'<rect x="{9 * place}" y="{9 * row}" width="8" height="8" rx="1.5" fill="{GROUP_COLORS[group]}"/>'
    for row, groups in enumerate(((0, 0, 1), (0, 1, 2), (1, 2, 2)))
    for place, group in enumerate(groups)
)
HEADING = f"""
<h1><svg viewBox="0 0 26 26" aria-hidden="true">{LOGO}</svg>PatchScaler</h1>
<p>Upscales a photograph four times, and spends diffusion steps only on the patches that need them: a demo of the
method of <cite>PatchScaler</cite> (Liu et al., ICCV 2025).</p>
"""
FOOTER = """
<h2>What happens here</h2>
<p>The image is enlarged with bicubic interpolation and restored once as a whole by the global restoration module
(GRM), which also says for every place how sure it is. The restored image is cut into overlapping patches, which are
grouped by their mean confidence: above γ₁ simple, up to γ₂ hard, medium between. Patch-DiT then refines each group by
diffusion from time T in N steps, guided by textures that resemble the patch and were looked up in a reference memory.
The refined patches are blended, decoded, and given the colours of the input. A patch's result depends on its
content, its T and N and the seed, so a second run renders only the patches whose T, N or seed changed.</p>
<p>The method is that of <cite><a href="https://arxiv.org/abs/2405.17158">PatchScaler: An Efficient Patch-Independent
Diffusion Model for Image Super-Resolution</a></cite> (Liu et al., ICCV 2025). This is an independent implementation
with weights of its own: small ones, trained from scratch for this demo on a few thousand images. They are not the
paper's, do not reach its quality, and know nothing of faces or print in particular. Fine detail is made up: it is
plausible, not evidence.</p>
"""

# Read by page.css.
COLORS = "".join(
    f'.group-{name}, #mode label:has([value="{name}"]) {{ --group-color: {color}; }}'
    for name, color in zip(GROUPS, GROUP_COLORS)
)
# Nothing is fetched from font servers, so the page looks the same without a network.
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="zinc",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_600",
    block_label_text_color="*neutral_600",
    block_label_border_width="0px",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_radius="*radius_lg",
    button_primary_background_fill="*primary_700",  # white on it is read by everybody
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    slider_color="*primary_600",
    slider_color_dark="*primary_500",
)


def launch_settings(jobs: Jobs) -> dict[str, Any]:
    """What `launch` is given with a page: its looks, and what keeps it safe."""
    here = Path(__file__)
    return {
        **server.launch_settings(jobs),
        "theme": THEME,
        "css": COLORS,
        "css_paths": here.with_name("page.css"),
        "js": here.with_name("page.js").read_text(encoding="utf-8"),
        "footer_links": ["api"],
    }


def build_page(pipeline: PatchScalerPipeline, jobs: Jobs, first: PatchScalerPipeline | None = None) -> gr.Blocks:
    """The whole page over a loaded pipeline, ready for `launch(**launch_settings(jobs))`.

    `first` is the pipeline that runs the first example before the page opens with it: the same, or on ZeroGPU, where
    that would spend a visitor's seconds, one on the CPU. Without it the page opens empty.
    """
    examples = [save_file_to_cache(path, str(server.upload_folder())) for path in example_files()]
    runner = Runner(pipeline, jobs)
    runner.examples = examples
    view, state = emptied(None), PageState()
    if first:
        opener = runner if first is pipeline else Runner(first, jobs, runner.cache, gpu_on_demand=False)
        view, state = opener.first_run(examples[0])
    # So that Gradio deletes what it took in when the server stops. While it runs, `server.sweep` would do.
    delete_cache = (server.SWEEP_SECONDS, server.KEPT_SECONDS)
    with gr.Blocks(title="PatchScaler", fill_width=True, delete_cache=delete_cache) as blocks:
        gr.HTML(HEADING, elem_id="heading")
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="controls", scale=0, min_width=300):
                with gr.Column(elem_id="start", min_width=280):
                    _input(view)
                with gr.Column(elem_id="plan", min_width=280):
                    _plan()
            with gr.Column(elem_id="results", min_width=280), gr.Tabs():
                with gr.Tab("One image"):
                    _results(view)
                with gr.Tab("Several images", elem_id="batch-tab"):
                    _batch()
        gr.HTML(FOOTER, elem_id="footer")
        gr.Textbox(visible="hidden", show_label=False, elem_id="query")
        components = {block.elem_id: block for block in blocks.blocks.values() if block.elem_id}
        events.connect(blocks, {**components, "state": gr.State(state)}, runner)
        Endpoints(runner).publish(blocks)
    return blocks.queue(max_size=events.WAITING, api_open=False, default_concurrency_limit=1)
