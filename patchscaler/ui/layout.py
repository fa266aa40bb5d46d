"""The page: what stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from patchscaler.figures import GROUP_COLORS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS
from patchscaler.ui import controls, panels, serving, sweeping
from patchscaler.ui.api import Endpoints
from patchscaler.ui.batch import batch_tab
from patchscaler.ui.gpu import zero_gpu
from patchscaler.ui.handlers import Handlers
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.wiring import WAITING, wire

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
The final picture is the restored one with their fine detail. A patch's result depends on its content, its T and N and
the seed, so a second run renders only the patches whose T, N or seed changed.</p>
<p>The method is that of <cite><a href="https://arxiv.org/abs/2405.17158">PatchScaler: An Efficient Patch-Independent
Diffusion Model for Image Super-Resolution</a></cite> (Liu et al., ICCV 2025). This is an independent implementation
with weights of its own: small ones, trained from scratch for this demo on a few thousand images. They are not the
paper's, do not reach its quality, and know nothing of faces or print in particular. Fine detail is made up: it is
plausible, not evidence.</p>
"""

# Read by page.css.
COLORS = "".join(f".group-{name} {{ --group-color: {color}; }}" for name, color in zip(GROUPS, GROUP_COLORS))
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
    look = {
        "theme": THEME,
        "css": COLORS,
        "css_paths": here.with_name("page.css"),
        "js": here.with_name("page.js").read_text(encoding="utf-8"),
        "footer_links": ["api"],
    }
    return {**serving.launch_settings(jobs), **look}


def build_page(pipeline: PatchScalerPipeline, jobs: Jobs, warm_up: bool = False) -> gr.Blocks:
    """The whole page over a loaded pipeline, ready for `launch(**launch_settings(jobs))`.

    `warm_up` has the networks run once in the background, so that the first visitor waits no longer than others
    and is told what a run costs; on ZeroGPU that would spend somebody's seconds, and is not done.
    """
    handlers = Handlers(pipeline, jobs)
    if warm_up and not zero_gpu():
        jobs.background(handlers.warmed_up)
    delete_cache = (sweeping.SWEEP_SECONDS, sweeping.KEPT_SECONDS)
    with gr.Blocks(title="PatchScaler", fill_width=True, delete_cache=delete_cache) as page:
        gr.HTML(HEADING, elem_id="heading")
        with gr.Row(elem_id="columns"):
            parts = controls.sidebar()
            with gr.Column(elem_id="results", min_width=280), gr.Tabs():
                with gr.Tab("One image"):
                    parts.update(panels.results())
                with gr.Tab("Several images", elem_id="batch-tab"):
                    tab = batch_tab()
        gr.HTML(FOOTER, elem_id="footer")
        wire(handlers, parts, tab)
        query = gr.Textbox(visible="hidden", show_label=False)
        page.load(
            handlers.linked,
            query,
            [parts["preset"], *parts["dials"], parts["color_fix"], parts["uniform"], parts["batch"]],
            js="() => window.location.search",
            queue=False,
            preprocess=False,
            api_visibility="private",
        )
        Endpoints(handlers).publish(page, WAITING)
    return page.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)
