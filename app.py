"""Start the page: `python app.py`, or as a Hugging Face Space.

Environment: PATCHSCALER_WEIGHTS, a pipeline folder or Hub id to load in place of the repository's own weights;
GRADIO_SERVER_PORT, 7860 unless set.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import spaces  # noqa: F401, I001  before torch: on ZeroGPU it takes hold of CUDA first

from patchscaler.checkpoints import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.ui.layout import LAUNCH, build_page

demo = build_page(load_pipeline(os.environ.get("PATCHSCALER_WEIGHTS", DEFAULT_WEIGHTS)))

if __name__ == "__main__":
    demo.launch(**LAUNCH)
