"""What holds for the repository as a whole: import directions, weight sizes, the README's front matter."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# Imports run downwards only. Parts on one floor may import each other, except the four at the top, but not in a circle.
# Nothing imports the package's own __init__, which has names from several floors.
FLOORS = [
    {"version", "images", "limits", "srgb", "tiff_samples", "transparency", "color", "patches", "device", "figures"}
    | {"cancellation", "tiles", "plan"},
    {"models"},
    {"sampling", "retrieval", "adapters"},
    {"pipeline", "results", "loading", "options", "files", "cluster", "several", "large", "analysis_file"},
    {"ui", "cli", "training", "evaluation"},
]
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor} | {
    "__init__": 3,
    "__main__": 4,
}
TOP = FLOORS[-1]


def imported_names(source: str, package: str) -> set[str]:
    """The full names within patchscaler that a file imports anywhere in it. `package` is that of the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*home, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(name for name in names if name.split(".")[0] == "patchscaler")
    return found


def imported_parts(source: str, package: str) -> set[str]:
    """The parts that a file imports, "__init__" for the package itself."""
    steps = [name.split(".") for name in imported_names(source, package)]
    return {each[1] if len(each) > 1 and each[1] in FLOOR_OF else "__init__" for each in steps}


def wrong_imports(part: str, source: str, package: str) -> set[str]:
    others = imported_parts(source, package) - {part}
    up = {other for other in others if FLOOR_OF[other] > FLOOR_OF[part] or (other in TOP and part in TOP)}
    return up | (others & {"__init__"})


def modules() -> list[Path]:
    return sorted((ROOT / "patchscaler").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "patchscaler").parts[0].removesuffix(".py")


def test_every_part_has_a_floor():
    assert {part_of(path) for path in modules()} <= set(FLOOR_OF)


def test_no_modules_import_each_other_in_a_circle():
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()]
    names = dict(zip([name.removesuffix(".__init__") for name in dotted], modules()))
    graph = {}
    for name, path in names.items():
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        imported = imported_names(path.read_text(), package)
        # A name stands for itself if it is a module's, else for the module that it is in.
        graph[name] = {each if each in names else each.rpartition(".")[0] for each in imported}
        assert graph[name] <= names.keys(), name
    TopologicalSorter(graph).prepare()  # CycleError names a circle


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    source, package = path.read_text(), ".".join(path.relative_to(ROOT).parts[:-1])
    assert not wrong_imports(part_of(path), source, package)


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("images", "from patchscaler.models.grm import GRM", {"models"}),
        ("models", "import patchscaler.pipeline", {"pipeline"}),
        ("ui", "from patchscaler import cli, images", {"cli"}),
        ("training", "def f():\n    from ..evaluation import metrics", {"evaluation"}),
        ("cli", "from patchscaler.figures import qmap_overlay\nfrom patchscaler import files", set()),
        ("cli", "from patchscaler import __version__", {"__init__"}),
        ("ui", "import patchscaler", {"__init__"}),
        ("ui", "from .. import Picture", {"__init__"}),
        ("training", "from . import data\nfrom .fit import fit", set()),
    ],
)
def test_the_import_check_itself(part, source, wrong):
    package = "patchscaler" if part in ("images", "cli") else f"patchscaler.{part}"
    assert wrong_imports(part, source, package) == wrong


def test_gradio_stays_in_the_page():
    for path in modules():
        if part_of(path) == "ui":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"gradio", "spaces"}, path


def test_weights_stay_below_the_limits_of_the_hub():
    sizes = {path: path.stat().st_size for path in (ROOT / "assets/weights").rglob("*") if path.is_file()}
    assert max(sizes.values()) < 10_000_000, max(sizes, key=sizes.get)
    assert sum(sizes.values()) <= 64_000_000


def front_matter() -> dict:
    empty, matter, _ = (ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(matter)


def test_front_matter_suits_a_gradio_space():
    matter = front_matter()
    assert matter["sdk"] == "gradio"
    assert (ROOT / matter["app_file"]).is_file()
    assert len(matter["short_description"]) <= 60  # the Hub's limit
    assert matter["license"] == "apache-2.0"
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {matter["colorFrom"], matter["colorTo"]} <= colors
    assert isinstance(matter["python_version"], str)  # unquoted, 3.10 would be 3.1


def test_front_matter_and_requirements_name_one_gradio():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {r.name: r for r in (Requirement(line.split("#")[0]) for line in lines if line.split("#")[0])}
    assert requirements["gradio"].specifier.contains(str(front_matter()["sdk_version"]))


def test_the_documents_name_tests_files_and_functions_that_there_are():
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named, file = 0, None
    for place, test in re.findall(r"`(tests/\w+\.py)?::(\w+)`", security):
        file = place or file
        named += 1
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
    assert named > 30
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## How it works\n")[1].split("\n## ")[0]
    places = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", section)
    assert len(places) > 15
    for file, function in places:
        source = (ROOT / "patchscaler" / file).read_text(encoding="utf-8")
        for name in function.split("."):
            assert re.search(rf"(def|class) {name}\b", source), f"{file}: {function}"
