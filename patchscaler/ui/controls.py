"""The sidebar: the image, what a run is to do, and the buttons that start and stop it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from patchscaler.plan import GROUPS, SamplingPlan
from patchscaler.ui.dials import CUSTOM, RANGES

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESET_NAMES = {"paper": "Paper", "fast": "Fast", "balanced": "Balanced", "uniform": "Uniform 20", CUSTOM: "Custom"}


def sidebar() -> dict[str, Any]:
    """All controls by name; `dials` lists gamma1 to the seed in the order of `dials.py`."""
    with gr.Column(elem_id="controls", scale=0, min_width=300):
        with gr.Column(elem_id="start", min_width=280):
            controls = _start()
        with gr.Column(elem_id="plan", min_width=280):
            controls.update(_plan())
    return controls


def _start() -> dict[str, Any]:
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
    note = gr.HTML("", elem_id="note")
    examples = sorted(path for path in EXAMPLES.glob("*") if path.suffix.lower() in (".png", ".jpg", ".webp"))
    if examples:
        paths = [str(path) for path in examples]
        gr.Examples(paths, image, label="Examples", elem_id="examples", api_visibility="private")
    with gr.Column(elem_id="go", min_width=0):
        with gr.Row():
            run = gr.Button("Run", variant="primary", min_width=100, scale=2, interactive=False, elem_id="run")
            stop = gr.Button("Stop", variant="stop", min_width=80, scale=1, interactive=False, elem_id="stop")
        cost = gr.HTML("", elem_id="cost")
    return {"image": image, "note": note, "run": run, "stop": stop, "cost": cost}


def _plan() -> dict[str, Any]:
    plan = SamplingPlan.paper()
    choices = [(label, name) for name, label in PRESET_NAMES.items()]
    preset = gr.Dropdown(choices, value="paper", label="Preset", elem_id="preset")
    gammas = [
        _slider("γ₁ simple above confidence", RANGES[0], plan.gamma1, "gamma1"),
        _slider("γ₂ hard up to confidence", RANGES[1], plan.gamma2, "gamma2"),
    ]
    starts, steps = [], []
    for i, name in enumerate(GROUPS):
        index = "₁₂₃"[i]
        with gr.Column(elem_classes=["group", f"group-{name}"]):
            gr.HTML(f"<h2>{name.capitalize()} patches</h2>")
            with gr.Row():
                starts.append(_slider(f"Start T{index}", RANGES[2 + i], plan.start[i], f"start{i + 1}"))
                steps.append(_slider(f"Steps N{index}", RANGES[5 + i], plan.steps[i], f"steps{i + 1}"))
    with gr.Row(elem_id="seed-row"):
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=120, scale=3)
        dice = gr.Button("⚄ New seed", elem_id="dice", min_width=100, scale=1, size="sm")
    label = "Budget: seconds of a full run"
    budget = gr.Slider(0, 60, 60, step=0.01, label=label, interactive=False, buttons=[], elem_id="budget")
    uniform = gr.Checkbox(False, label="Uniform baseline too (T 1000, N 20)", elem_id="uniform")
    info = "Colours of the input, structure of the coarse image. Off: the refined patches as they are decoded."
    color_fix = gr.Checkbox(True, label="Colour fix", info=info, elem_id="color-fix")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        label = "Patch batch: patches at once, 1 to 256. Empty: what suits the device"
        batch = gr.Number(None, label=label, precision=0, elem_id="batch")
    named = {"preset": preset, "budget": budget, "dice": dice, "uniform": uniform}
    return {**named, "color_fix": color_fix, "batch": batch, "dials": [*gammas, *starts, *steps, seed]}


def _slider(label: str, limits: tuple[float, float, float], value: float, elem_id: str) -> gr.Slider:
    low, high, step = limits
    return gr.Slider(low, high, value, step=step, label=label, elem_id=elem_id, buttons=[], min_width=120)
