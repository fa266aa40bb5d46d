"""The endpoints for programs, called as programs call them: over HTTP, from a server in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from service import PATIENCE, Service, serving

from patchscaler.analysis_file import AnalysisFileError, fingerprint, read_analysis, write_analysis
from patchscaler.images import Picture, write_png
from patchscaler.pipeline import PatchScalerPipeline
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.ui.export import restored

pytestmark = pytest.mark.slow  # a real server

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def service(tiny_pipeline, tmp_path_factory) -> Iterator[Service]:
    with serving(tiny_pipeline, tmp_path_factory.mktemp("uploads")) as service:
        yield service


@pytest.fixture(scope="module")
def call(service, tmp_path_factory):
    """An endpoint's outputs, as gradio_client gives them."""
    client = Client(
        service.address,
        verbose=False,
        download_files=tmp_path_factory.mktemp("downloads"),
        httpx_kwargs={"timeout": PATIENCE},
    )
    yield lambda name, *files, **options: client.predict(*map(handle_file, files), **options, api_name=name)
    client.close()


@pytest.fixture(scope="module")
def image(picture, tmp_path_factory):
    alpha = torch.linspace(0, 1, picture.width).expand(1, picture.height, -1)
    return write_png(Picture(picture.rgb, alpha), tmp_path_factory.mktemp("image") / "a photo.png")


@pytest.fixture(scope="module")
def analyzed(call, image):
    return call("/analyze", image)


@pytest.fixture(scope="module")
def analysis(analyzed):
    return analyzed[2]


@pytest.fixture(scope="module")
def plan(analyzed):
    """Arguments of a quick plan under which no group is empty."""
    confidence = sorted(analyzed[3]["confidence"])
    return {"gamma1": confidence[5], "gamma2": confidence[1], "start": [100, 200, 300], "steps": [1, 2, 3]}


def pixels(path: str) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_upscale_gives_the_picture_and_reads_no_file_but_uploads(service, call, image):
    path, report = call("/upscale", image, start=[100, 200, 300], steps=[1, 2, 3], seed=5)
    with Image.open(path) as final, Image.open(image) as small:
        assert final.format == "PNG" and final.size == (4 * small.width, 4 * small.height)
        assert json.loads(final.text["plan"])["steps"] == [1, 2, 3]
    assert report["seed"] == 5 and [group["steps"] for group in report["groups"]] == [1, 2, 3]

    for bad in (str(image), {"path": str(image)}, {"path": str(image), "meta": {"_type": "gradio.FileData"}}):
        event = service.post("call/upscale", {"data": [bad, 0.95, 0.75, [1, 2, 3], [1, 1, 1], 0, True]}).json()
        assert "event: error" in service.web.get(f"/gradio_api/call/upscale/{event['event_id']}").text


def test_analyze_gives_the_stages_and_says_what_it_found(analyzed, tiny_pipeline, picture):
    coarse, overlay, analysis, report = analyzed
    for path, name in ((coarse, "a_photo_coarse.png"), (overlay, "a_photo_qmap.png")):
        assert Path(path).name == name
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", (320, 256))
    assert Path(analysis).name == "a_photo_analysis.safetensors"
    assert (report["width"], report["height"]) == (320, 256)
    assert report["grid"] == {"patch": 128, "left": [0, 96, 192], "top": [0, 64, 128]}
    assert set(report["seconds"]) == {"encode", "restore", "retrieve", "decode"}
    confidence = torch.tensor(report["confidence"])
    assert report["assignment"] == [GROUPS[group] for group in assign(confidence, SamplingPlan.paper()).tolist()]
    assert report["counts"]["hard"] == report["assignment"].count("hard")


def test_analyze_and_refine_are_upscale_bit_by_bit(call, image, analysis, plan):
    final, report = call("/refine", analysis, **plan, seed=7)
    at_once, same = call("/upscale", image, **plan, seed=7)
    assert pixels(final) == pixels(at_once)
    with Image.open(final) as first, Image.open(at_once) as second:
        assert first.text == second.text and first.mode == "RGBA" and first.size == (320, 256)
    assert Path(final).name == Path(at_once).name == "a_photo_x4.png"
    without_times = [
        {**values, "stages": None, "groups": [{**group, "seconds": 0} for group in values["groups"]]}
        for values in (report, same)
    ]
    assert without_times[0] == without_times[1] and report["by_hand"] == {}
    assert all(group["patches"] for group in report["groups"])
    # Each of these says something else, and is heard.
    for changed in ({"seed": 8}, {"color_fix": False}, {"by_hand": {"0": "simple", "1": "hard"}}, {"steps": [3, 3, 3]}):
        other, report = call("/refine", analysis, **{**plan, "seed": 7, **changed})
        assert pixels(other) != pixels(final)
        ((name, value),) = changed.items()
        assert report.get(name, report["plan"].get(name)) == value


@pytest.mark.parametrize("endpoint", ["/upscale", "/refine"])
def test_a_png_without_the_colour_fix_says_so_and_the_page_restores_it_as_off(
    service, call, image, analysis, plan, endpoint
):
    file = {"/upscale": image, "/refine": analysis}[endpoint]
    for color_fix, note in ((True, None), (False, "off")):
        path, report = call(endpoint, file, **plan, seed=7, color_fix=color_fix)
        with Image.open(path) as final:
            assert final.text.get("color_fix") == note
        assert report["color_fix"] is color_fix
        # Dropped on the page, it brings its settings along.
        view = restored(path)
        assert (view["seed"], view["color-fix"]) == (7, color_fix)


def test_a_known_image_is_analyzed_once(call, image, analyzed, monkeypatch):
    monkeypatch.setattr(PatchScalerPipeline, "analyze", None)
    assert call("/analyze", image)[3] == analyzed[3]


def test_regroup_runs_no_network_and_waits_for_nobody(service, call, analysis, analyzed, plan, monkeypatch):
    for name in ("analyze", "refine", "prior_images"):
        monkeypatch.setattr(PatchScalerPipeline, name, None)
    by_hand = {"4": "hard", "0": "simple"}
    with service.jobs._lock:  # no job can be admitted
        overlay, report = call("/regroup", analysis, **plan, by_hand=by_hand)
        nothing, same = call("/regroup", confidence=analyzed[3]["confidence"], **plan, by_hand=by_hand)
    assert nothing is None and report == same
    made = SamplingPlan(plan["gamma1"], plan["gamma2"], tuple(plan["start"]), tuple(plan["steps"]))
    expected = assign(torch.tensor(analyzed[3]["confidence"]), made, {4: 2, 0: 0})
    assert report["assignment"] == [GROUPS[group] for group in expected.tolist()]
    counts = expected.bincount(minlength=3).tolist()
    assert report["counts"] == dict(zip(GROUPS, counts)) and report["by_hand"] == by_hand
    assert (report["evaluations"], report["uniform_evaluations"]) == (made.evaluations(counts), 9 * 20)
    with Image.open(overlay) as drawn:
        assert drawn.size == (320, 256)


def test_under_the_papers_plan_both_overlays_are_the_same(call, analysis, analyzed):
    assert pixels(call("/regroup", analysis)[0]) == pixels(analyzed[1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"gamma1": 0.5, "gamma2": 0.6}, "gamma1=0.5 must be above gamma2=0.6"),
        ({"start": [1, 2]}, "start and steps are lists of three whole numbers"),
        ({"steps": [8, 14, 5000]}, "steps=5000 of the hard group is not a whole number in 1..1000"),
        ({"by_hand": {"9": "hard"}}, "patch 9 in group 2: there are 9 patches"),
        ({"by_hand": {"-1": "hard"}}, "patch -1 in group 2"),
        ({"by_hand": {"1": "harder"}}, "by_hand={'1': 'harder'} is not like"),
        ({"by_hand": {"1": ["hard"]}}, "is not like"),
        ({"by_hand": [1, 2]}, "by_hand=[1, 2] is not like"),
    ],
)
def test_arguments_that_cannot_be_are_named(call, analysis, arguments, text):
    for name in ("/regroup", "/refine"):
        with pytest.raises(AppError, match=re.escape(text)):
            call(name, analysis, **arguments)


@pytest.mark.parametrize(
    "confidence",
    [[], [0.5, "0.5"], [True], [0.5, float("nan")], [1.5], "0.5", [[0.5]], {"0": 0.5}, [None], [10**400],
     [0.5] * 50_001],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_confidences_that_cannot_be_are_refused(service, confidence):
    event = service.post("call/v2/regroup", {"confidence": confidence}).json()["event_id"]
    answer = service.web.get(f"/gradio_api/call/regroup/{event}").text
    assert "event: error" in answer and re.search("list of numbers|outside \\[0, 1\\]|the limit is 50,000", answer)


def test_regroup_needs_either_the_file_or_the_confidences(call, analysis):
    for options in ({}, {"analysis": handle_file(analysis), "confidence": [0.5]}):
        with pytest.raises(AppError, match="either analysis or confidence"):
            call("/regroup", **options)
    with pytest.raises(AppError, match="color_fix=1 is neither true nor false"):
        call("/refine", analysis, color_fix=1)


# The analysis file


ALTERATIONS = {
    "no rgb": (lambda t, m: t.pop("rgb"), "rgb has shape"),
    "no latents": (lambda t, m: t.pop("latents"), "it holds"),
    "one more": (lambda t, m: t.update(more=torch.zeros(1)), "it holds"),
    "another type": (lambda t, m: t.update(latents=t["latents"].half()), "latents is F16"),
    "another size": (lambda t, m: t.update(latents=t["latents"][:, :-1]), "latents is F32"),
    "other channels": (lambda t, m: t.update(latents=t["latents"][:1]), "latents is F32"),
    "fewer patches": (lambda t, m: t.update(patch_confidence=t["patch_confidence"][:-1]), "patch_confidence is F32 8"),
    "larger overlay": (lambda t, m: t.update(grey=torch.zeros(5000, 5000, dtype=torch.uint8)), "grey is U8 5000×5000"),
    "larger alpha": (lambda t, m: t.update(alpha=torch.zeros(1, 9, 9)), "alpha is F32 1×9×9"),
    "no pixels": (lambda t, m: t.update(rgb=torch.zeros(3, 0, 80)), "rgb has shape"),
    "flat": (lambda t, m: t.update(rgb=torch.zeros(9)), "rgb has shape"),
    "NaN": (lambda t, m: t["latents"].view(-1)[5].fill_(float("nan")), "latents goes from nan"),
    "infinite": (lambda t, m: t["latents"].view(-1)[5].fill_(float("inf")), "latents goes from .* to inf"),
    "huge": (lambda t, m: t["latents"].mul_(1e30), "limits are -1000 and 1000"),
    "sure": (lambda t, m: t["patch_confidence"].fill_(1.01), "the limits are 0 and 1"),
    "surer": (lambda t, m: t["confidence"].fill_(-0.5), "confidence goes from -0.5 to -0.5; the limits are 0 and 1"),
    "bright": (lambda t, m: t["rgb"].fill_(2), "rgb goes from 2 to 2; the limits are -1 and 1"),
    "opaque": (lambda t, m: t["alpha"].fill_(-1), "alpha goes from -1 to -1"),
    "no facts": (lambda t, m: m.clear(), "its metadata format is .*required"),
    "more facts": (lambda t, m: m.update(more="1"), "its metadata more is '1'.*not permitted"),
    "no JSON": (lambda t, m: m.update(notes="[" * 100_000), "its metadata notes is .*Invalid JSON"),
    "another format": (lambda t, m: m.update(format='"PatchScaler analysis 0"'), "should be 'PatchScaler analysis 2'"),
    "other weights": (lambda t, m: m.update(weights='"0"'), "made with other weights"),
    "no seconds": (lambda t, m: m.update(seconds="{}"), "seconds is .* at least 4 items"),
    "long": (lambda t, m: m.update(seconds=m["seconds"].replace("0.", "9e99")), "a finite number"),
    "infinitely long": (lambda t, m: m.update(seconds=re.sub(r"[\d.]+", "NaN", m["seconds"])), "a finite number"),
    "talkative": (lambda t, m: m.update(notes=json.dumps(["x" * 201])), "notes.0 is .* at most 200 characters"),
    "more talkative": (lambda t, m: m.update(notes=json.dumps(["x"] * 9)), "notes is .* at most 8 items"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_analysis_is_refused(tiny_pipeline, analysis, tmp_path, name):
    change, text = ALTERATIONS[name]
    tensors = load_file(analysis)
    with safe_open(analysis, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "altered", metadata)
    with pytest.raises(AnalysisFileError, match=text):
        read_analysis(tmp_path / "altered", tiny_pipeline, fingerprint(tiny_pipeline))


def test_damaged_files_are_refused_by_both_endpoints(call, analysis, image, tmp_path):
    data = Path(analysis).read_bytes()
    for name, content in {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "longer": data + b"x",
        "pickle": b"\x80\x05\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
        "header": b"\xff" * 8 + data[8:],
        "flipped": data[:20] + bytes(20) + data[40:],
    }.items():
        (tmp_path / name).write_bytes(content)
        for endpoint in ("/regroup", "/refine"):
            with pytest.raises(AppError, match="not an analysis file from /analyze"):
                call(endpoint, tmp_path / name)
    with pytest.raises(AppError, match="not an analysis file"):
        call("/refine", image)


def test_an_analysis_over_the_limits_is_refused_by_its_header(tiny_pipeline, analysis, monkeypatch):
    for name, value in (("INPUT", 64 * 80 - 1), ("OUTPUT", 16 * 64 * 80 - 1)):
        monkeypatch.setenv(f"PATCHSCALER_MAX_{name}_PIXELS", str(value))
        with pytest.raises(AnalysisFileError, match="80×64 is 5,120 pixels; the limit is 5,119"):
            read_analysis(analysis, tiny_pipeline, fingerprint(tiny_pipeline))
        monkeypatch.delenv(f"PATCHSCALER_MAX_{name}_PIXELS")


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64), (500, 2)])
def test_an_analysis_of_any_size_comes_back_whole(tiny_pipeline, tmp_path, size):
    picture = Picture(torch.rand(3, *size) * 2 - 1, notes=("Only the first frame is used.",))
    analysis, weights = tiny_pipeline.analyze(picture), fingerprint(tiny_pipeline)
    grey = Image.new("L", (min(1024, 4 * size[1]), min(1024, 4 * size[0])))
    if max(size) > 256:
        grey = grey.resize((1024, 4) if size[0] == 2 else (max(1, round(4 * size[1] * 1024 / (4 * size[0]))), 1024))
    path = write_analysis(analysis, grey, weights, tmp_path / "file")
    loaded = read_analysis(path, tiny_pipeline, weights)
    restored = loaded.restored()
    assert torch.equal(loaded.confidence, analysis.confidence)
    assert restored.picture.notes == picture.notes and restored.seconds == analysis.seconds
    assert restored.grid == analysis.grid and torch.equal(restored.bicubic, analysis.bicubic)
    for name in ("latents", "patch_confidence"):
        assert torch.equal(getattr(restored, name), getattr(analysis, name))
    plan = SamplingPlan(0.9, 0.1, (5, 5, 5), (1, 1, 1))
    finals = [list(tiny_pipeline.refine(known, plan, 3))[-1].picture.rgb for known in (analysis, restored)]
    assert torch.equal(*finals)


# What is public


def test_the_four_endpoints_are_documented_and_no_other_is_there(service):
    for query in ("", "?all_endpoints=true"):
        endpoints = httpx.get(f"{service.address}gradio_api/info{query}").json()["named_endpoints"]
        assert list(endpoints) == ["/analyze", "/regroup", "/refine", "/upscale"]
    settings = "gamma1: float = 0.95, gamma2: float = 0.75, start: list[int] = [400, 700, 1000], "
    settings += "steps: list[int] = [8, 14, 20]"
    by_hand = "by_hand: dict(str, Literal['simple', 'medium', 'hard']) = {}"
    file = "filepath"
    assert {name: signature(endpoint) for name, endpoint in endpoints.items()} == {
        "/analyze": f"image: {file}",
        "/regroup": f"analysis: {file} = None, confidence: list[float] = None, {settings}, {by_hand}",
        "/refine": f"analysis: {file}, {settings}, seed: int = 0, {by_hand}, color_fix: bool = True",
        "/upscale": f"image: {file}, {settings}, seed: int = 0, color_fix: bool = True",
    }
    for endpoint in endpoints.values():
        assert endpoint["description"].endswith(".") and "Args" not in endpoint["description"]
        for value in endpoint["parameters"] + endpoint["returns"]:
            assert len(value["python_type"]["description"]) > 20 and not re.match(r"\d", value["label"]), value
    assert [value["label"] for value in endpoints["/analyze"]["returns"]] == ["coarse", "overlay", "analysis", "report"]


def signature(endpoint: dict) -> str:
    return ", ".join(
        f"{value['parameter_name']}: {value['python_type']['type']}"
        + (f" = {value['parameter_default']}" if value["parameter_has_default"] else "")
        for value in endpoint["parameters"]
    )


def test_heavy_endpoints_wait_in_line_with_the_pages_runs(service):
    groups = {name: fn.concurrency_id for name, fn in service.functions.items()}
    limits = {name: fn.concurrency_limit for name, fn in service.functions.items()}
    for name in ("analyze", "refine", "upscale"):
        assert groups[name] == groups["run"] == "pipeline" and limits[name] == limits["run"]
        assert service.functions[name].queue
    assert not service.functions["regroup"].queue


def test_calls_of_many_clients_run_one_after_another(service, call, image, analysis, plan):
    client = Client(service.address, verbose=False, httpx_kwargs={"timeout": PATIENCE})
    jobs = [
        client.submit(handle_file(file), **plan, seed=seed, api_name=name)
        for seed in range(2)
        for name, file in (("/refine", analysis), ("/upscale", image))
    ]
    finals = [job.result()[0] for job in jobs]
    client.close()
    assert service.watch.most == 1
    assert pixels(finals[0]) == pixels(finals[1]) != pixels(finals[2]) == pixels(finals[3])


# The README


@pytest.mark.parametrize("language", ["python", "sh"])
def test_the_readmes_calls_run_as_they_are_printed(service, image, tmp_path, language):
    section = README.read_text(encoding="utf-8").split("\n## Call it from a program\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert "http://127.0.0.1:7860" in block
    block = block.replace("http://127.0.0.1:7860", service.address.rstrip("/"))
    with Image.open(image) as picture:
        picture.convert("RGB").save(tmp_path / "photo.jpg")
    command = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
    run = subprocess.run([*command, block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    with Image.open(tmp_path / "photo.x4.png") as final:
        final.load()
        assert (final.format, final.size, final.text["seed"]) == ("PNG", (320, 256), "7")
