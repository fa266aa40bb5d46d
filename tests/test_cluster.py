"""`upscale --engine ray`: real Ray on this machine, real worker processes, really killed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from patchscaler import cluster
from patchscaler.__main__ import main
from patchscaler.options import UsageError
from patchscaler.plan import SamplingPlan

IMAGES = 40
PLAN = SamplingPlan(0.9, 0.5, start=(20, 30, 40), steps=(1, 2, 2))


class MortalWorker(cluster.Worker):
    """A worker that keeps a list of what it writes, and is killed by images whose names say so."""

    def upscale(self, source, output, job, repeated):
        @contextmanager
        def stored(place):
            with write(place) as file:
                yield file
            with open(os.path.join(os.path.dirname(source), "written"), "a") as file:
                file.write(place + "\n")
            if "dies-after" in source:
                os.kill(os.getpid(), signal.SIGKILL)

        if "dies-before" in source and not repeated or "dies-always" in source:
            os.kill(os.getpid(), signal.SIGKILL)
        write, cluster.stored = cluster.stored, stored
        try:
            return super().upscale(source, output, job, repeated)
        finally:
            cluster.stored = write


@pytest.fixture(scope="module")
def address():
    """Address of a Ray cluster of one node with two cores, which is stopped at the end."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield nodes.address
    nodes.shutdown()


def make_images(folder, names):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in names:
        Image.fromarray(draw.integers(0, 256, (16, 20, 3), "uint8")).save(folder / name)


@pytest.mark.slow
def test_forty_images_two_workers_some_killed_then_resumed(address, weights, tmp_path):
    source, out, said = tmp_path / "in", tmp_path / "out", []
    deadly = {5: "dies-before", 20: "dies-after", 30: "dies-always"}
    names = [f"{number:02}{deadly.get(number, '')}.png" for number in range(IMAGES + 1)]
    make_images(source, names)
    (source / "bad.jpg").write_bytes(b"no image")

    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    job = cluster.Job(PLAN, 3, str(weights))
    counts = cluster.run([str(source)], str(out), job, 2, "cpu", address, said.append, MortalWorker)
    assert counts == {"done": IMAGES, "failed": 2, "found": 0}

    # 1. Every output is there once, whole, and was written once; nothing else is there.
    whole = sorted(name for name in names if "always" not in name)
    assert sorted(path.name for path in out.iterdir()) == [*whole, "manifest.json"]
    for name in whole:
        with Image.open(out / name) as image:
            image.load()
            assert image.size == (80, 64)
    assert sorted((source / "written").read_text().split()) == [str(out / name) for name in whole]

    # 2. The manifest says how each image ended.
    entries = json.loads((out / "manifest.json").read_text())["images"]
    assert {os.path.basename(name) for name in entries} == {*names, "bad.jpg"}
    ended = {os.path.basename(name): entry for name, entry in entries.items()}
    assert [ended[names[n]]["attempts"] for n in (0, *deadly)] == [1, 2, 2, cluster.ATTEMPTS]
    assert ended["bad.jpg"]["error"].startswith("not a readable PNG") and ended["bad.jpg"]["attempts"] == 1
    assert ended[names[30]]["error"] == "2 workers died on it"
    assert all(entry["output"] == str(out / f"{name[:-4]}.png") for name, entry in ended.items())
    assert len({entry["process"] for entry in ended.values() if "process" in entry}) >= 3  # two, and a restarted one
    assert sum("images/s" in line for line in said) == IMAGES + 2

    # 3. Resumed, only what failed is tried again, and what was lost is made again.
    (source / "bad.jpg").unlink()
    (source / names[30]).unlink()
    stamps = {name: (out / name).stat().st_mtime_ns for name in whole}
    assert cluster.run([str(source)], str(out), job, 2, "cpu", say=said.append)["found"] == IMAGES
    (out / whole[0]).unlink()
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    options = ["--engine", "ray", "--device", "cpu", "--weights", weights, "--plan", tmp_path / "plan.json"]
    command = ["-m", "patchscaler", "upscale", source, "-o", out, "--seed", "3", *options]  # Ray on this machine
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0 and "1 done, 0 failed, 39 found" in done.stdout, done.stderr
    again = {name for name in whole if (out / name).stat().st_mtime_ns != stamps[name]}
    assert again == {whole[0]}


def test_urls_are_read_and_written(tiny_pipeline, tmp_path):
    """An object store as far as our code can tell: only fsspec's interface, no local paths, no rename."""
    import fsspec

    make_images(tmp_path / "in", ["a.png"])
    store = fsspec.filesystem("memory")
    store.pipe_file("/in/a.png", (tmp_path / "in" / "a.png").read_bytes())
    store.pipe_file("/in/notes.txt", b"not looked at")
    store.pipe_file("/in/sub/b.jpg", b"no image")
    store.pipe_file("/in/sub/._b.jpg", b"a sidecar")
    store.pipe_file("/in/c.jxl", b"not read")
    first = {"memory:///in/a.png": "memory://out/a.png"}
    assert cluster.plan_outputs(["memory://in"], "memory://out") == (first, ["memory:///in/c.jxl"])
    both, _ = cluster.plan_outputs(["memory://in"], "memory://out", recursive=True, suffix="_x4")
    assert list(both.values()) == ["memory://out/a_x4.png", "memory://out/sub/b_x4.png"]

    worker = cluster.Worker.__new__(cluster.Worker)
    worker.pipeline = tiny_pipeline
    job = cluster.Job(PLAN, 3, "weights")
    entry = worker.upscale("memory:///in/a.png", "memory://out/a.png", job, repeated=False)
    assert entry["status"] == "done" and store.exists("/out/a.png")
    local = worker.upscale(str(tmp_path / "in" / "a.png"), str(tmp_path / "a.png"), job, repeated=False)
    assert local["pixels"] == entry["pixels"] == 80 * 64
    assert store.cat_file("/out/a.png") == (tmp_path / "a.png").read_bytes()
    # A worker that died on it had written it; and an output of another seed is not this one.
    assert "pixels" not in worker.upscale("memory:///in/a.png", "memory://out/a.png", job, repeated=True)
    other = cluster.Job(PLAN, 4, "weights")
    assert "pixels" in worker.upscale("memory:///in/a.png", "memory://out/a.png", other, repeated=True)
    worker.upscale("memory:///in/a.png", "memory://out/a.png", job, repeated=False)

    # What lies in the output folder is no input, by whatever name that folder is given.
    (tmp_path / "in" / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in" / "out")
    worker.upscale(str(tmp_path / "in" / "a.png"), str(tmp_path / "in" / "out" / "a.png"), job, repeated=False)
    images, _ = cluster.find_images(str(tmp_path / "in"), str(tmp_path / "link"), recursive=True)
    assert list(images.values()) == ["a.png"]
    store.pipe_file("/in/out/a.png", store.cat_file("/out/a.png"))
    images, _ = cluster.find_images("memory://in", "memory://in/out", recursive=True)
    assert list(images.values()) == ["a.png", "sub/b.jpg"]

    manifest = cluster.Manifest("memory://out", job)
    assert not manifest.resumed and cluster._found(first, manifest, job) == []  # ours, and may be made again
    manifest.record("memory:///in/a.png", entry)
    again = cluster.Manifest("memory://out", job)
    assert again.content == manifest.content and cluster._found(first, again, job) == list(first)
    again.content["images"].clear()  # the driver died before it said so
    assert cluster._found(first, again, job) == list(first)
    again.content["images"].clear()
    store.pipe_file("/out/a.png", (tmp_path / "in" / "a.png").read_bytes())
    with pytest.raises(UsageError, match="out/a.png exists and is not PatchScaler's output of memory:///in/a.png"):
        cluster._found(first, again, job)


def test_what_would_lose_something_is_refused(tmp_path):
    make_images(tmp_path / "in", ["a.png", "a.jpg"])
    job = cluster.Job(PLAN, 0, "w")
    with pytest.raises(UsageError, match="would be both the output of"):
        cluster.run([str(tmp_path / "in")], str(tmp_path / "out"), job)
    with pytest.raises(UsageError, match="would be both the input"):
        cluster.run([str(tmp_path / "in" / "a.png")], str(tmp_path / "in"), job)
    make_images(tmp_path / "out", ["a.png"])
    outputs, _ = cluster.plan_outputs([str(tmp_path / "in")], str(tmp_path / "out"), suffix="_x4")
    assert [os.path.basename(output) for output in outputs.values()] == ["a_jpg_x4.png", "a_png_x4.png"]
    with pytest.raises(UsageError, match=r"out/a.png exists and is not PatchScaler's output of"):
        cluster.run([str(tmp_path / "in" / "a.jpg")], str(tmp_path / "out"), job)
    manifest = cluster.Manifest(str(tmp_path / "out"), job)
    manifest.record("somewhere/b.png", {"status": "done"})
    with pytest.raises(UsageError, match="another plan, seed, weights, colour fix or precision"):
        cluster.run([str(tmp_path / "in" / "a.jpg")], str(tmp_path / "out"), cluster.Job(PLAN, 1, "w"))
    assert not cluster.Manifest(str(tmp_path / "out"), cluster.Job(PLAN, 1, "w"), overwrite=True).content["images"]
    with pytest.raises(UsageError, match="the folder /proc cannot be written to"):
        cluster.run([str(tmp_path / "in" / "a.jpg")], "/proc", job)
    with pytest.raises(UsageError, match="would have 260 bytes"):
        cluster.run([str(tmp_path / "in" / "a.jpg")], str(tmp_path / "out"), job, suffix="x" * 255)
    with pytest.raises(UsageError, match="bucket: "):
        cluster.run(["nosuchprotocol://bucket"], str(tmp_path / "out"), job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "need --engine ray"),
        (["--address", "auto"], "need --engine ray"),
        (["--engine", "ray", "--save-stages"], "need --engine local"),
        (["--engine", "ray", "--report", "r.json"], "need --engine local"),
        (["--engine", "ray", "--devices", "cpu,cpu"], "need --engine local"),
        (["--engine", "spark"], "invalid choice"),
    ],
)
def test_usage_errors(tmp_path, options, message, capsys):
    make_images(tmp_path / "in", ["a.png"])
    with pytest.raises(SystemExit) as stop:
        main(["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_urls_need_ray(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["upscale", "s3://bucket/in", "-o", str(tmp_path / "out")])
    assert "s3://bucket/in needs --engine ray" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_no_worker_can_load(address, tmp_path, capsys):
    make_images(tmp_path / "in", ["a.png"])
    arguments = ["--engine", "ray", "--address", address, "--device", "cpu", "--weights", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main(["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *arguments])
    assert "a worker cannot load the pipeline: " in capsys.readouterr().err
    job = cluster.Job(PLAN, 0, str(tmp_path))
    with pytest.raises(UsageError, match="9 workers need 9 cores; Ray has 2"):
        cluster.run([str(tmp_path / "in")], str(tmp_path / "out"), job, 9, "cpu", address)
