"""How the page is served: the settings that keep it safe, and the endpoint that says how it fares."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import patchscaler
from patchscaler.images import Limits
from patchscaler.ui.doorkeeper import MAX_JSON, Doorkeeper
from patchscaler.ui.jobs import Jobs
from patchscaler.ui.sweeping import sweeping


def launch_settings(jobs: Jobs) -> dict[str, Any]:
    """What `launch` is given for safety's sake. New ones for every launch: Gradio writes into them."""
    largest = Limits.from_environment().file_bytes
    return {
        "max_file_size": largest,
        "allowed_paths": [],
        "show_error": False,
        "enable_monitoring": False,
        "strict_cors": True,
        "ssr_mode": False,
        "mcp_server": mcp_wanted(),
        "run_history": False,
        "state_session_capacity": 200,
        "app_kwargs": {
            "middleware": [Middleware(Doorkeeper, max_upload=largest + MAX_JSON)],
            "routes": [Route("/health", health_endpoint(jobs))],
            "lifespan": sweeping,
            "openapi_url": None,
        },
    }


def mcp_wanted() -> bool:
    """Whether GRADIO_MCP_SERVER asks for the API as tools for language models, by the Model Context Protocol.

    SystemExit if a package is missing for that: Gradio would only print it, and serve the page without the tools.
    """
    if os.environ.get("GRADIO_MCP_SERVER", "").lower() not in ("true", "1"):
        return False
    if find_spec("mcp") is None:
        raise SystemExit("GRADIO_MCP_SERVER is set, but the package mcp is missing: pip install 'gradio[mcp]==6.31.*'")
    return True


def health_endpoint(jobs: Jobs) -> Callable:
    async def health(request: Request) -> JSONResponse:
        """For a supervisor: 200, or 503 when only a restart helps. Runs no network and waits for none."""
        worker = jobs.state()
        queued = len(request.app.get_blocks()._queue)
        content = {
            "status": "ok" if worker["alive"] else "stuck",
            "version": patchscaler.__version__,
            "worker": worker,
            "queued": queued,  # runs that Gradio has not let through to the worker yet
        }
        return JSONResponse(content, 200 if worker["alive"] else 503)

    return health
