"""The page: what stands where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from patchscaler.figures import GROUP_COLORS
from patchscaler.grouping import GROUPS
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.ui import controls, panels, serving, sweeping
from patchscaler.ui.api import Endpoints
from patchscaler.ui.batch import batch_tab
from patchscaler.ui.gpu import zero_gpu
from patchscaler.ui.handlers import Handlers
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.wiring import WAITING, wire

HEADING = """
<h1>PatchScaler</h1>
<p>Upscales a photograph four times, and spends diffusion steps only on the patches that need them.
A demo of <cite>PatchScaler: An Efficient Patch-Independent Diffusion Model for Image Super-Resolution</cite>
(Liu et al., ICCV 2025).</p>
"""
FOOTER = """
<h2>What happens here</h2>
<p>The image is enlarged with bicubic interpolation and restored once as a whole by the global restoration module
(GRM), which also says for every place how sure it is. The restored image is cut into overlapping patches, which are
grouped by their mean confidence: above γ₁ simple, up to γ₂ hard, medium between. Patch-DiT then refines each group by
diffusion from time T in N steps, guided by textures that resemble the patch and were looked up in a reference memory.
A patch's result depends on its content, its T and N and the seed, so a second run renders only the patches whose T, N
or seed changed.</p>
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
).set(body_text_color_subdued="*neutral_600", block_label_text_color="*neutral_600")


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
