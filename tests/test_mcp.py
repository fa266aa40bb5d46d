"""The endpoints as tools for language models."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections.abc import Iterator

import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult
from PIL import Image
from service import Service, serving

from patchscaler.images import write_png
from patchscaler.ui.server import mcp_wanted

pytestmark = pytest.mark.slow  # a real server

QUICK = {"start": [100, 200, 300], "steps": [1, 1, 1]}


@pytest.fixture(scope="module")
def service(tiny_pipeline, tmp_path_factory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_MCP_SERVER", "True")
        with serving(tiny_pipeline, tmp_path_factory.mktemp("uploads")) as service:
            yield service


@pytest.fixture(scope="module")
def image(service, picture, tmp_path_factory):
    """The image's file and its address on the server."""
    path = write_png(picture, tmp_path_factory.mktemp("image") / "photo.png")
    uploaded = service.upload("photo.png", path.read_bytes())["path"]
    return path, f"{service.address}gradio_api/file={uploaded}"


def use(service: Service, work) -> object:
    """What `work` does with a client's session."""

    async def session():
        async with streamable_http_client(f"{service.address}gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as client:
                await client.initialize()
                return await work(client)

    return asyncio.run(session())


def call(service: Service, name: str, **arguments) -> CallToolResult:
    async def silent(*_):
        pass

    return use(service, lambda client: client.call_tool(name, arguments, progress_callback=silent))


def texts(answer: CallToolResult) -> list[str]:
    return [part.text for part in answer.content if part.type == "text"]


def pictures(answer: CallToolResult) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(part.data))) for part in answer.content if part.type == "image"
    ]


def test_the_tools_are_the_four_endpoints_and_say_what_they_do(service):
    tools = {tool.name: tool for tool in use(service, lambda client: client.list_tools()).tools}
    assert list(tools) == ["analyze", "regroup", "refine", "upscale"]
    for tool in tools.values():
        assert "Returns: " in tool.description and "x4" not in tool.description
        assert all(value["description"] for value in tool.inputSchema["properties"].values())
    assert tools["upscale"].inputSchema["required"] == ["image"]
    assert "required" not in tools["regroup"].inputSchema
    assert tools["refine"].inputSchema["properties"]["steps"]["default"] == [8, 14, 20]


def test_an_image_is_upscaled_at_once_and_in_steps(service, image):
    path, address = image
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    at_once = call(service, "upscale", image=data, **QUICK, seed=3)
    assert not at_once.isError and '"seed": 3' in texts(at_once)[-1].replace("'", '"')
    (final,) = pictures(at_once)
    assert final.size == (320, 256)

    found = call(service, "analyze", image=address)
    assert [drawn.size for drawn in pictures(found)] == [(320, 256)] * 2
    (file,) = (text for text in texts(found) if text.endswith(".safetensors"))
    refined = call(service, "refine", analysis=file, **QUICK, seed=3)
    assert pictures(refined)[0].tobytes() == final.tobytes()
    regrouped = call(service, "regroup", analysis=file)
    assert pictures(regrouped)[0].tobytes() == pictures(found)[1].tobytes()
    assert "uniform_evaluations" in texts(regrouped)[-1]


def test_clients_that_ask_for_no_progress_get_addresses(service, image):
    answer = use(service, lambda client: client.call_tool("upscale", {"image": image[1], **QUICK}))
    assert not answer.isError and f"{service.address}gradio_api/file=" in texts(answer)[0]


@pytest.mark.parametrize("name", ["upscale", "regroup"])
def test_no_address_is_fetched_and_no_other_file_is_read(service, name, capfd):
    argument = {"upscale": "image", "regroup": "analysis"}[name]
    for address in (
        "https://example.com/a.png",
        "http://169.254.169.254/latest/meta-data",
        f"{service.address}health",
        "http://127.0.0.1/gradio_api/file=/etc/passwd",
        "http://127.0.0.1/gradio_api/file=http://example.com/a.png",
        "/etc/passwd",
    ):
        answer = call(service, name, **{argument: address})
        assert answer.isError and "root:" not in str(answer), address
    assert service.health()["status"] == "ok"


def test_errors_are_told(service, image):
    answer = call(service, "upscale", image=image[1], gamma1=0.1)
    assert answer.isError and "gamma1=0.1 must be above gamma2=0.75" in texts(answer)[0]


def test_the_protocol_is_served_only_on_request_and_only_if_it_can_be(monkeypatch):
    monkeypatch.delenv("GRADIO_MCP_SERVER", raising=False)
    assert not mcp_wanted()
    monkeypatch.setenv("GRADIO_MCP_SERVER", "False")
    assert not mcp_wanted()
    monkeypatch.setenv("GRADIO_MCP_SERVER", "True")
    assert mcp_wanted()
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(SystemExit, match="pip install 'gradio\\[mcp\\]"):
        mcp_wanted()
