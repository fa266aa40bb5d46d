"""The right side of the page for one image: what the method made of it, and how."""

from __future__ import annotations

from typing import Any

import gradio as gr

from patchscaler.plan import GROUPS
from patchscaler.ui import compare, fragments

INSPECT = "inspect"  # what a click does, besides the groups' names
PANELS = {"coarse": "Coarse HR", "qmap": "Qmap overlay", "priors": "Texture priors", "final": "Final output"}
CAPTIONS = {
    "coarse": "Restored without diffusion",
    "priors": "Retrieved, with similarities",
    "final": "Lossless PNG, plan and seed inside",
}


def results() -> dict[str, Any]:
    """Status line, panels, close-ups, timing and inspector, by name; most are those of RunView and DialView."""
    outputs: dict[str, Any] = {"status": gr.HTML(fragments.status(fragments.NO_IMAGE), elem_id="status")}
    with gr.Row(elem_id="panels"):
        for name, label in PANELS.items():
            with gr.Column(elem_classes=["stage"], min_width=0):
                outputs[name] = gr.Image(
                    label=label,
                    interactive=False,
                    # A click on the Qmap picks a patch, and positions are wrong in fullscreen.
                    buttons=[] if name == "qmap" else ["download", "fullscreen"],
                    elem_id=name,
                    alt_text=label,
                )
                if name == "qmap":
                    outputs["legend"] = gr.HTML(fragments.legend(), elem_id="legend")
                else:
                    gr.HTML(f'<p class="quiet">{CAPTIONS[name]}</p>')
    outputs["stale"] = gr.HTML("", elem_id="stale")
    with gr.Row(elem_id="groups"):
        outputs["histogram"] = gr.HTML("", elem_id="histogram")
        outputs.update(_by_hand())
    outputs["grid"] = gr.HTML("", elem_id="grid", padding=False)
    outputs.update(_closeups())
    outputs.update(_timing())
    gr.HTML("<h2>Patch inspector</h2>")
    outputs["inspector"] = gr.HTML(fragments.NO_PATCH, elem_id="inspector")
    outputs["inspected"] = gr.HTML("", elem_id="inspected")
    for name, empty in (("shown", None), ("source", None), ("by_hand", {}), ("center", None), ("patch", None)):
        outputs[name] = gr.State(empty)
    return outputs


def _by_hand() -> dict[str, Any]:
    """What a click or a stroke on the Qmap does."""
    modes = [("Inspect", INSPECT), *((f"Make {name}", name) for name in GROUPS)]
    with gr.Column(elem_id="hand", min_width=280):
        mode = gr.Radio(
            modes,
            value=INSPECT,
            label="Click a patch of the Qmap, or draw over several, to…",
            elem_id="mode",
        )
        with gr.Row(elem_id="hand-row"):
            number = gr.Number(None, label="Patch", precision=0, elem_id="number", min_width=100, minimum=0)
            reset = gr.Button("Reset hand-set patches", size="sm", elem_id="reset", min_width=100)
            seams = gr.Checkbox(False, label="Patch borders", elem_id="seams", min_width=120)
        facts = gr.HTML("", elem_id="facts")
        stroke = gr.Button("Stroke", visible="hidden", elem_id="stroke")  # pressed by page.js
    return {"mode": mode, "number": number, "reset": reset, "seams": seams, "facts": facts, "stroke": stroke}


def _closeups() -> dict[str, Any]:
    """The before/after slider and its magnified crop."""
    outputs = {}
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
    return outputs


def _timing() -> dict[str, Any]:
    """Where the seconds went, what uniform sampling would cost more, and what to take home."""
    gr.HTML("<h2>Time</h2>")
    outputs: dict[str, Any] = {"timing": gr.HTML(fragments.NO_TIMING, elem_id="timing")}
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
    with gr.Row(elem_id="takehome"):
        outputs["pack"] = gr.Button("Make a ZIP of all stages", size="sm", elem_id="pack", min_width=160, scale=0)
        outputs["zip"] = gr.File(label="All stages and report.json", visible=False, interactive=False, elem_id="zip")
    return outputs
