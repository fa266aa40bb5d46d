"""Start the page: `python app.py`, or as a Hugging Face Space.

Environment: PATCHSCALER_WEIGHTS, a pipeline folder or Hub id to load in place of the repository's own weights;
GRADIO_SERVER_PORT, 7860 unless set; GRADIO_TEMP_DIR, a folder for uploads and results, in which what is older than
an hour is deleted; GRADIO_MCP_SERVER, True to offer the API as tools for language models; PATCHSCALER_DTYPE, float32,
bfloat16 or float16 in place of what suits the device; the limits in SECURITY.md.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.request import getproxies


def configure_proxies() -> None:
    """Have Gradio reach its own page past any proxy, and not fail on a proxy that httpx cannot use.

    Its clients read the variables when it is imported, and ask this server whether it has started.
    """
    proxies = getproxies()  # lower case before upper case, as httpx has it
    hosts = proxies.get("no", "").split(",") if proxies.get("no") else []
    if "*" not in hosts:
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    usable = ("http", "https", *(("socks5", "socks5h") if find_spec("socksio") else ()))
    for kind in ("all", "http", "https"):
        scheme, found, _ = proxies.get(kind, "").partition("://")
        if found and scheme not in usable:
            for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY"):
                os.environ.pop(name, None)
            print(
                f"{kind}_proxy is not used: {scheme} is none of {', '.join(usable)} (socks5: pip install socksio)",
                file=sys.stderr,
            )


configure_proxies()
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
# Of its own, since it is swept: Gradio's default belongs to all pages of the machine.
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir()) / f"patchscaler-{os.getuid()}"))

import spaces  # noqa: F401, I001  before torch: on ZeroGPU it takes hold of CUDA first

from patchscaler.loading import DEFAULT_WEIGHTS, load_pipeline
from patchscaler.ui.events import WAITING
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.page import build_page, launch_settings
from patchscaler.ui.networks import zero_gpu

jobs = Jobs(threads=WAITING if zero_gpu() else 1)  # there runs wait for devices, not for each other
weights = os.environ.get("PATCHSCALER_WEIGHTS", DEFAULT_WEIGHTS)
pipeline = load_pipeline(weights)
demo = build_page(pipeline, jobs, first=load_pipeline(weights, device="cpu") if zero_gpu() else pipeline)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a supervisor's stop is as good as Ctrl-C
    try:
        demo.launch(**launch_settings(jobs))
    finally:
        jobs.close()  # or Python would wait for the run at work and all that wait for their turn
