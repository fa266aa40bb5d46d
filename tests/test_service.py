"""Anything sent to the page and its API is refused with a short message or done right, and the server still answers."""

from __future__ import annotations

import io
import re
import socket
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from corpus import cases, encoded, noise
from corpus import write as write_corpus
from PIL import Image
from service import QUICK, Service, file_data, serving

from patchscaler.ui.server import MAX_FILES, MAX_JSON
from patchscaler.ui.state import MAX_SEED, dials_of

# A real server. Pillow warns of bombs and of broken tags.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
API = "/gradio_api"
DIALS = (*dials_of(QUICK), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def service(tiny_pipeline, folder):
    with serving(tiny_pipeline, folder) as service:
        yield service


@pytest.fixture(scope="module")
def image(service):
    return service.upload("a photo.png", encoded(Image.fromarray(noise(14, 18)), "PNG"))


@pytest.fixture(autouse=True)
def alive(service):
    yield
    assert service.health()["status"] == "ok"


def picture(service: Service, file: dict) -> Image.Image:
    answer = service.web.get(f"{API}/file={file['path']}")
    assert answer.status_code == 200
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    return image


def pixels(service: Service, file: dict) -> bytes:
    return picture(service, file).tobytes()


def test_every_file_of_the_corpus_by_page_and_api(service, capfd, caplog):
    for case in cases():
        file = service.upload(case.name, case.data)
        shown = service.run(f"corpus {case.name}", file, DIALS)
        called = service.call(file)
        if case.refused is not None:
            assert case.refused in shown["error"] and case.refused in shown["status"], case.name
            assert "final" not in shown and "coarse" not in shown
            assert isinstance(called, str) and case.refused in called, case.name
            for text in (shown["error"], shown["status"], called):
                assert "/" not in text.replace("</p>", "") and len(text) < 400
        else:
            assert case.note in shown["status"], case.name
            first, second = picture(service, shown["final"]), picture(service, called[0])
            assert first.tobytes() == second.tobytes()
            assert first.size == (4 * case.size[0], 4 * case.size[1]), case.name
            assert first.mode == ("RGBA" if case.alpha else "RGB"), case.name
            assert not first.getexif() and set(first.info) == {"Software", "plan", "seed"}
        assert service.health()["code"] == 200, case.name
    assert "Traceback" not in capfd.readouterr().err and not caplog.records


def test_a_strip_of_one_row_is_upscaled(service):
    strip = service.upload("strip.png", encoded(Image.new("L", (5000, 1), 90), "PNG"))
    assert picture(service, service.call(strip)[0]).size == (20_000, 4)


@pytest.mark.parametrize(
    "name", ["x.gif", "x.pdf", "", "a/../../../etc/passwd", "x" * 5000 + ".png", "nul\0.png", "<b>.png", None]
)
def test_a_spoofed_name_changes_nothing(service, image, name):
    spoofed = {**image, "orig_name": name, "mime_type": "application/pdf", "size": -1}
    shown, called = service.run(f"spoofed {name}", spoofed, DIALS), service.call(spoofed)
    assert pixels(service, shown["final"]) == pixels(service, service.run("plain", image, DIALS)["final"])
    assert pixels(service, called[0]) == pixels(service, service.call(image)[0])
    assert name is None or len(name) < 3 or name not in called[0]["path"]


def test_an_uploads_name_stays_within_its_folder(service, folder):
    data = encoded(Image.new("RGB", (2, 2)), "PNG")
    for name in ("../../../evil.png", "nul\0.png", "/etc/evil.png", "a\\b.png", ".", "画" * 200 + ".png"):
        path = service.upload(name, data)["path"]
        assert Path(path).resolve().is_relative_to(folder) and Path(path).is_file()
        assert isinstance(service.call(file_data(path)), list)
    for name, status in (("..", 400), ("x" * 9000 + ".png", 413)):
        assert service.web.post(f"{API}/upload", files={"files": (name, data)}).status_code == status
    assert not list(folder.parent.rglob("evil.png")) or all(
        path.is_relative_to(folder) for path in folder.parent.rglob("evil.png")
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, 10.5, None, "8", [8], {}, -1, 0, 10**30])
@pytest.mark.parametrize(("place", "name"), [(0, "gamma1"), (2, "start"), (7, "steps")])
def test_a_sliders_value_is_checked_inside(service, image, value, place, name):
    """A dial that is moved there changes nothing; a run says what is wrong."""
    service.run("sliders", image, DIALS)  # from now on a moved dial has something to group
    dials = [0.9, 0.1, 1000, 1000, 1000, 1, 1, 1, 0]
    dials[place] = value
    answer = service.light("regrouped", "sliders", image, dials)
    assert answer.status_code == 200 and all("__type__" in part for part in answer.json()["data"][:8])
    error = service.run(f"slider {place} {value}", image, tuple(dials))["error"]
    assert re.match(rf"These settings do not work: {name}=.* (is not a (whole )?number in|must be above)", error), error


def test_a_plan_out_of_order_is_named(service, image):
    """In the page the dials push each other: test_tuning.py."""
    for arguments, text in [
        ({"gamma1": 0.1, "gamma2": 0.9}, "gamma1=0.1 must be above gamma2=0.9"),
        ({"gamma1": 0.5, "gamma2": 0.5}, "gamma1=0.5 must be above gamma2=0.5"),
        ({"start": [300, 200, 400]}, "start=(300, 200, 400) falls from simple to hard"),
        ({"start": [100, 200, 300], "steps": [3, 2, 1]}, "steps=(3, 2, 1) falls from simple to hard"),
        ({"start": [1, 1]}, "lists of three whole numbers"),
        ({"start": "111"}, "lists of three whole numbers"),
        ({"steps": [2, 2, 2]}, "steps=2 of the simple group is not a whole number in 1..1"),
    ]:
        assert text in service.call(image, **arguments)
    assert "must be above" in service.run("crossed", image, (0.1, 0.9, *DIALS[2:]))["error"]


@pytest.mark.parametrize("seed", [None, 0.5, -1, 2**53, 2**64, 10**40, "7", True, [1], float("nan")])
def test_a_seed_is_a_whole_number_up_to_the_limit_and_is_echoed(service, image, seed):
    refusal = "the seed is empty; it is a" if seed is None else "is not a"
    shown, called = service.run(f"{seed}", image, (*DIALS[:8], seed)), service.call(image, seed=seed)
    for text in (shown["error"], called):
        assert f"{refusal} whole number from 0 to {MAX_SEED}" in text and "seed" in text
    for seed in (0, MAX_SEED, 12.0):
        file, report = service.call(image, seed=seed)
        assert report["seed"] == seed and picture(service, file).text["seed"] == str(int(seed))


@pytest.mark.parametrize("value", [None, [], ["Final"], "", "final", 1, True, {"a": 1}, "x" * 10_000])
def test_a_choice_or_checkbox_that_the_page_does_not_offer_is_an_error(service, image, value, capfd):
    service.run("choices", image, DIALS)
    for name, element in (
        ("preset_chosen", "preset"), ("numbered", "mode"), ("brushed", "mode"), ("compared", "left"),
        ("zoomed", "right"), ("zoomed", "factor"),
    ):  # fmt: skip
        answer = service.light(name, "choices", image, **{element: value})
        assert answer.status_code == 500 and "is none of" in answer.json()["error"], (name, element)
        assert len(answer.text) < 1000
    if value is not True:
        for element in ("color-fix", "uniform"):
            error = service.run(f"{element} {str(value)[:9]}", image, **{element: value})["error"]
            assert "is neither true nor false" in error and len(error) < 1000
        assert "is neither true nor false" in service.call(image, color_fix=value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("query", [5, [], {}, "?plan=" + "9" * 9000, "?plan=nan,1,1,1,1,1,1,1&seed=inf", "?%00=%ff"])
def test_a_link_that_cannot_be_sets_nothing(service, query):
    answer = service.light("linked", "link", None, query=query)
    *parts, note = answer.json()["data"]
    assert answer.status_code == 200 and all(part == {"__type__": "update"} for part in parts)
    assert ("address are not valid" in str(note)) == ("plan=" in str(query)) and len(answer.text) < 1000


def test_what_is_uploaded_is_no_page(service):
    """Nothing of a visitor's runs in another's browser."""
    for name in ("a.html", "a.svg", "a.js", "a.xml"):
        path = service.upload(name, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")["path"]
        headers = service.web.get(f"{API}/file={path}").headers
        assert headers["content-disposition"].startswith("attachment") and "html" not in headers["content-type"]


@pytest.mark.parametrize("place", range(9))
def test_a_message_is_short_however_long_the_value(service, image, place):
    dials = [*DIALS]
    dials[place] = "y" * 100_000
    assert len(service.run(f"long {place}", image, tuple(dials))["error"]) < 1000
    assert len(service.call(image, seed="y" * 100_000)) < 1000


def test_an_error_is_html_on_the_page_and_plain_for_programs(service, image):
    for text in (
        service.light("preset_chosen", "html", image, preset="<b>").json()["error"],
        service.run("html", image, (*DIALS[:8], "<b>"))["error"],
    ):
        assert "&lt;b&gt;" in text and "<b>" not in text
    assert "seed='<b>' is not" in service.call(image, seed="<b>")


def test_wrong_requests_are_errors(service, image, capfd):
    for data in ([], [image], [image] * 5, [0.9, 0.1]):
        event = service.web.post(f"{API}/call/upscale", json={"data": data}).json()["event_id"]
        assert "event: error" in service.web.get(f"{API}/call/upscale/{event}").text
    for path, body in [
        ("call/nope", {"data": []}),
        ("call/v2/nope", {}),
        ("run/nope", {"data": []}),
        ("run/predict", {"data": []}),
        ("run/predict", {"data": [], "fn_index": 10**6, "session_hash": "x"}),
        ("run/predict", {"data": [], "fn_index": "upscale", "session_hash": "x"}),
        ("queue/join", {"data": [], "fn_index": -1, "session_hash": "x"}),
        ("queue/join", {"data": [image], "fn_index": 1}),
        ("queue/join", ["data"]),
        ("queue/join", {"data": "x" * 1000}),
        ("cancel", {}),
        ("upload", {}),
    ]:
        answer = service.web.post(f"{API}/{path}", json=body)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert "Traceback" not in answer.text and str(Path.cwd()) not in answer.text
    for content in (b"{", b"\xff\xfe", b"[" * 200_000, b"null", b""):
        for path in ("queue/join", "call/upscale", "run/predict"):
            answer = service.web.post(f"{API}/{path}", content=content, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, (path, content[:9])
    assert service.web.get("/nope").status_code == 404
    capfd.readouterr()
    for path in ("call/upscale/nope", "queue/data?session_hash=nope"):
        with suppress(httpx.RemoteProtocolError):  # it is cut off
            service.web.get(f"{API}/{path}")
    assert "Traceback" not in capfd.readouterr().err


def test_bodies_over_the_limit_are_refused(service):
    """They are refused before they are read whole, and whether they say how long they are or not."""
    json_header = {"content-type": "application/json"}

    def pieces(count: int, first: bytes = b""):
        yield first
        for _ in range(count):
            yield bytes(1_000_000)

    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    form = {"content-type": "multipart/form-data; boundary=x"}
    many = [("files", (f"{i}.png", b"abc")) for i in range(100)]
    post = service.web.post
    for answer in (
        post(f"{API}/upload", files={"files": ("large.png", bytes(20 * 2**20 + 1))}),
        post(f"{API}/upload", files={"files": ("larger.png", bytes(30_000_000))}),
        post(f"{API}/upload", content=pieces(30, part), headers=form),
        post(f"{API}/upload", files=many),
        post(f"{API}/upload", files=[("files", (f"{i}.png", bytes(900_000))) for i in range(100)]),
        post(f"{API}/upload", files=many[: MAX_FILES + 1]),
        post(f"{API}/queue/join", content=b'{"data":["' + b"x" * 60_000_000 + b'"]}', headers=json_header),
        post(f"{API}/call/upscale", content=b" " * (MAX_JSON + 1), headers=json_header),
        post(f"{API}/run/predict", content=pieces(60), headers=json_header),
    ):
        assert answer.status_code == 413 and re.search("limit is|maximum allowed size", answer.text)
    assert post(f"{API}/upload", files=many[:MAX_FILES]).status_code == 200
    assert post(f"{API}/upload", files={"files": ("fits.png", bytes(20 * 2**20))}).status_code == 200


def test_a_full_disk_takes_no_uploads(service, image, monkeypatch):
    """Uploads and pictures of moved dials stay for an hour, however many there are."""
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("patchscaler.ui.server.shutil.disk_usage", lambda folder: usage)
    answer = service.web.post(f"{API}/upload", files={"files": ("a.png", b"abc")})
    for refused in (answer, service.begin(image=image), service.light("regrouped", "full", image)):
        assert refused.status_code == 507 and "disk is full" in refused.text


@pytest.mark.parametrize("path", ["upload", "queue/join"])
def test_a_body_that_does_not_go_on_is_given_up(service, monkeypatch, path):
    monkeypatch.setattr("patchscaler.ui.server.BODY_SECONDS", 0.2)
    url = httpx.URL(service.address)
    with socket.create_connection((url.host, url.port), timeout=10) as slow:
        head = f"POST {API}/{path} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nContent-Length: 9000\r\n"
        slow.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
        assert b"408" in slow.recv(1000)


def test_heavy_events_cannot_be_run_past_the_queue(service, image):
    run = {"data": service.inputs("run", image), "fn_index": service.functions["run"]._id}
    before = service.watch.steps
    for path, body in [
        ("run/upscale", {"data": [image]}),
        ("api/upscale", {"data": [image]}),
        ("run/predict", run | {"session_hash": "direct"}),
        ("api/predict/", run | {"session_hash": "direct"}),
        ("run/predict", {"data": [image], "fn_index": service.functions["upscale"]._id, "session_hash": "direct"}),
    ]:
        answer = service.web.post(f"{API}/{path}", json=body)
        assert answer.status_code == 404 and "does not accept direct" in answer.text
    assert service.watch.steps == before


SECRET = "nobody may read this"


def test_no_file_but_uploads_and_results_is_served(service, tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET)
    secret, up = tmp_path / "secret.txt", "../" * 12
    for path in [
        *(
            f"{API}/file={name}"
            for name in (secret, f"{up}{secret}", f"file://{secret}", "app.py", "/etc/passwd", "\\")
        ),
        f"{API}/file/{secret}",
        *(f"/{place}/{up}etc/passwd" for place in ("static", "assets", "svelte", "custom_component/x/y")),
        f"/static/{'%2e%2e%2f' * 12}etc/passwd",
        f"/assets/{'..%2f' * 12}etc/passwd",
        f"{API}/file={'%2e%2e%2f' * 12}etc/passwd",
        f"{API}/file=http://127.0.0.1/",
        f"{API}/file=http%3A%2F%2F127.0.0.1/",
        f"{API}/file=HTTP:/127.0.0.1/",
        f"{API}/file/http://169.254.169.254/latest/meta-data",
        f"{API}/proxy=http://127.0.0.1/",
        f"{API}/proxy=http://169.254.169.254/",
        *(f"{API}/{name}" for name in ("dev/reload", "vibe-code", "stream/x", "mcp/sse", "deep_link?session_hash=x")),
        "/monitoring",
        "/docs",
        "/openapi.json",
    ]:
        answer = service.web.get(path)
        assert answer.status_code in (403, 404, 405), (path, answer.status_code)
        assert SECRET not in answer.text and "root:" not in answer.text


def test_no_event_reads_a_file_that_nobody_uploaded(service, image, tmp_path):
    """The same by page and API, and no address is fetched."""
    hidden = tmp_path / "hidden.png"
    hidden.write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    for path in (
        str(hidden),
        f"file://{hidden}",
        f"{image['path']}/../../../{hidden}",
        "/etc/passwd",
        "\0",
        "x" * 5000,
    ):
        shown, called = service.run(f"path {path[:99]}", file_data(path), DIALS), service.call(file_data(path))
        assert "error" in shown and "final" not in shown and isinstance(called, str)
        assert str(tmp_path) not in str(shown) + called
    for path in (str(hidden), image["path"]):  # Gradio checks where a file lies only if it is marked as one
        assert isinstance(service.call(path), str) and isinstance(service.call({"path": path}), str)
    for address in ("http://127.0.0.1:9/", "http://169.254.169.254/", "https://example.com/a.png", "http://[::1]/"):
        for answer in (
            service.join("address", file_data(address)),
            service.begin(image=file_data(address)),
            service.light("new_image", "address", file_data(address)),
            service.light("seams", "address", None, seams={"deep": [{"path": address}]}),
        ):
            assert answer.status_code == 403 and "uploaded, not fetched" in answer.text


def test_the_corpus_is_what_the_command_line_is_given(tmp_path):
    assert [case for _, case in write_corpus(tmp_path)] == list(cases())
