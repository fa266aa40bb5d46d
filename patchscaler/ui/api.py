"""The endpoints for programs: files and JSON in, files and JSON out, and no call depends on an earlier one.

Gradio makes the documentation of each, and a tool for MCP, from its signature and docstring. It reads return types as
they stand, so annotations are not postponed here, and it takes one line for each argument and result.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.data_classes import FileData
from gradio.utils import get_function_description
from pydantic import ValidationError
from torch import Tensor, empty, tensor

from patchscaler.analysis_file import fingerprint, read_analysis, write_analysis
from patchscaler.figures import qmap_overlay
from patchscaler.images import Picture, write_png
from patchscaler.patches import LATENT_PIXELS, PatchGrid
from patchscaler.pipeline import SCALE
from patchscaler.plan import GROUPS, SamplingPlan, assign
from patchscaler.results import Result
from patchscaler.ui.events import HEAVY
from patchscaler.ui.export import new_folder, save_final, stem
from patchscaler.ui.html import SettingsError, explained
from patchscaler.ui.networks import RunRequest
from patchscaler.ui.run import Runner
from patchscaler.ui.server import mcp_wanted
from patchscaler.ui.state import ByHand, CachedAnalysis, flag_of, plan_of, seed_of, whole_pictures
from patchscaler.version import __version__

PAPER = SamplingPlan.paper()
START, STEPS = list(PAPER.start), list(PAPER.steps)
Groups = dict[str, Literal["simple", "medium", "hard"]]
BY_CONFIDENCE: Groups = {}
ANALYSIS = "_analysis.safetensors"
MAX_CONFIDENCES = 50_000  # a square picture of 4 million pixels has some seven thousand patches


class Endpoints:
    """What a client can call. Work for the networks waits its turn with the page's runs."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._weights = fingerprint(runner.pipeline)

    def publish(self, page: gr.Blocks) -> None:
        """Add the endpoints to a page that is being built."""
        _publish(page, self.analyze, **HEAVY)
        # Outside the queue, but for MCP: Gradio gives its tools' files to such endpoints past the request filter.
        _publish(page, self.regroup, queue=mcp_wanted())
        _publish(page, self.refine, **HEAVY)
        _publish(page, self.upscale, **HEAVY)

    async def analyze(self, image: FileData) -> tuple[FileData, FileData, FileData, dict]:
        """Restore an image coarsely at four times its size, and estimate for each patch how sure that restoration is. Once done for an image, regroup tries plans on the result at no cost, and refine renders them.

        Args:
            image: a PNG, JPEG, WebP, TIFF, BMP, GIF (first frame) or AVIF of up to 4 million pixels and 20 MB, or this server's own limits

        Returns:
            coarse: the restored image at four times the size, a lossless PNG
            overlay: the groups under the paper's thresholds: teal simple, amber medium, crimson hard; a PNG
            analysis: the file for regroup and refine, in safetensors format
            report: size, patch grid, each patch's confidence row by row, its group, seconds of each stage, notes
        """  # noqa: E501
        with explained():
            request = RunRequest(_path("image", image), PAPER, 0, {}, live=False, refine=False)
            return await self._last(request, self._runner.events, self._analyzed)

    def regroup(
        self,
        analysis: FileData | None = None,
        confidence: list[float] | None = None,
        gamma1: float = PAPER.gamma1,
        gamma2: float = PAPER.gamma2,
        start: list[int] = START,  # noqa: B006  never changed
        steps: list[int] = STEPS,  # noqa: B006
        by_hand: Groups = BY_CONFIDENCE,
    ) -> tuple[FileData | None, dict]:
        """Tell which patches of an analysed image a plan makes simple, medium and hard, and how many network evaluations it costs. Runs no network and waits for no other call.

        Args:
            analysis: the file that analyze gave; either this or confidence is needed
            confidence: the confidence of each patch from analyze's report; then no overlay is drawn
            gamma1: patches with a confidence above this are simple; at most 1
            gamma2: patches with a confidence up to this are hard, those between medium; below gamma1
            start: diffusion time, 1 to 1000, at which simple, medium and hard patches start; never falling
            steps: sampling steps of simple, medium and hard patches, each from 1 to its start; never falling
            by_hand: patches whose group is set whatever their confidence, as {"7": "hard"}; counted from 0

        Returns:
            overlay: the groups drawn over the coarse image in grey, a PNG of at most 1024 pixels a side
            report: the plan, the number of patches in each group, each patch's group, and network evaluations
        """  # noqa: E501
        with explained():
            plan, by_hand = _plan(gamma1, gamma2, start, steps), _by_hand(by_hand)
            if (analysis is None) == (confidence is None):
                raise SettingsError("either analysis or confidence is needed, and not both")
            if analysis is None:
                return None, _grouped(plan, _assign(_confidences(confidence), plan, by_hand), by_hand)
            path = _path("analysis", analysis)
            with whole_pictures():
                loaded = read_analysis(path, self._runner.pipeline, self._weights)
                assignment = _assign(loaded.patch_confidence, plan, by_hand)
                coarse = empty(3, SCALE * loaded.picture.height, SCALE * loaded.picture.width, device="meta")
                overlay = qmap_overlay(coarse, loaded.grid, assignment, by_hand, loaded.grey)
                return _drawn(overlay, _name(path)), _grouped(plan, assignment, by_hand)

    async def refine(
        self,
        analysis: FileData,
        gamma1: float = PAPER.gamma1,
        gamma2: float = PAPER.gamma2,
        start: list[int] = START,  # noqa: B006
        steps: list[int] = STEPS,  # noqa: B006
        seed: int = 0,
        by_hand: Groups = BY_CONFIDENCE,
        color_fix: bool = True,
    ) -> tuple[FileData, dict]:
        """Render an analysed image under a plan. With the same plan and seed the result is that of upscale.

        Args:
            analysis: the file that analyze gave
            gamma1: patches with a confidence above this are simple; at most 1
            gamma2: patches with a confidence up to this are hard, those between medium; below gamma1
            start: diffusion time, 1 to 1000, at which simple, medium and hard patches start; never falling
            steps: sampling steps of simple, medium and hard patches, each from 1 to its start; never falling
            seed: of the noise, 0 to 2^53 - 1; the same seed gives the same image
            by_hand: patches whose group is set whatever their confidence, as {"7": "hard"}; counted from 0
            color_fix: give the result the colours of the input

        Returns:
            final: the image at four times the size, a lossless PNG with plan and seed inside
            report: the plan, the seed, and patches, network evaluations and seconds of each group and stage
        """
        with explained():
            plan, seed, color_fix = _plan(gamma1, gamma2, start, steps), seed_of(seed), flag_of("color_fix", color_fix)
            request = RunRequest(_path("analysis", analysis), plan, seed, _by_hand(by_hand), color_fix, live=False)
            return await self._last(request, self._refined, _result)

    async def upscale(
        self,
        image: FileData,
        gamma1: float = PAPER.gamma1,
        gamma2: float = PAPER.gamma2,
        start: list[int] = START,  # noqa: B006
        steps: list[int] = STEPS,  # noqa: B006
        seed: int = 0,
        color_fix: bool = True,
    ) -> tuple[FileData, dict]:
        """Upscale a photograph four times in each direction: analyze and refine in one call. Fine detail is made up: it is plausible, not evidence.

        Args:
            image: a PNG, JPEG, WebP, TIFF, BMP, GIF (first frame) or AVIF of up to 4 million pixels and 20 MB, or this server's own limits
            gamma1: patches with a confidence above this are simple; at most 1
            gamma2: patches with a confidence up to this are hard, those between medium; below gamma1
            start: diffusion time, 1 to 1000, at which simple, medium and hard patches start; never falling
            steps: sampling steps of simple, medium and hard patches, each from 1 to its start; never falling
            seed: of the noise, 0 to 2^53 - 1; the same seed gives the same image
            color_fix: give the result the colours of the input

        Returns:
            final: the image at four times the size, a lossless PNG with plan and seed inside
            report: the plan, the seed, and patches, network evaluations and seconds of each group and stage
        """  # noqa: E501
        with explained():
            plan, seed, color_fix = _plan(gamma1, gamma2, start, steps), seed_of(seed), flag_of("color_fix", color_fix)
            request = RunRequest(_path("image", image), plan, seed, {}, color_fix, live=False)
            return await self._last(request, self._runner.events, _result)

    def _analyzed(self, request: RunRequest, known: CachedAnalysis) -> tuple[dict, dict, dict, dict]:
        analysis, name = known.analysis, _name(request.source)
        assignment = assign(analysis.patch_confidence, PAPER)
        coarse = write_png(Picture(analysis.coarse), new_folder() / f"{name}_coarse.png")
        file = write_analysis(analysis, known.grey, self._weights, new_folder() / f"{name}{ANALYSIS}")
        height, width = analysis.coarse.shape[-2:]
        report = {
            "version": __version__,
            "width": width,
            "height": height,
            "grid": _grid(analysis.grid),
            "confidence": analysis.patch_confidence.tolist(),
            **_grouped(PAPER, assignment, {}),
            "seconds": analysis.seconds,
            "notes": list(analysis.picture.notes),
        }
        return _handed(coarse), _drawn(known.overlay(assignment), name), _handed(file), report

    def _refined(self, request: RunRequest) -> Iterator[Any]:
        loaded = read_analysis(request.source, self._runner.pipeline, self._weights)
        _assign(loaded.patch_confidence, request.plan, request.by_hand)
        return self._runner.networks.run(request, loaded.restored())

    async def _last(
        self,
        request: RunRequest,
        events: Callable[[RunRequest], Iterator[Any]],
        returned: Callable[[RunRequest, Any], tuple],
    ) -> tuple:
        """Go through the request's events as a job, and return what `returned` makes of the last."""

        def job() -> Iterator[Any]:
            for event in events(request):
                yield event
            yield returned(request, event)

        async for item in self._runner.jobs.stream(job):
            last = item
        return last


def _publish(page: gr.Blocks, endpoint: Callable, **options: Any) -> None:
    """`gr.api`, with the docstring's lines in the places from which Gradio's page of endpoints takes them."""
    event = gr.api(endpoint, api_name=endpoint.__name__, **options)
    _, arguments, results = get_function_description(endpoint)
    for number, (name, text) in zip(event["inputs"], arguments.items()):
        block = page.blocks[number]
        # What may be left out need not also be null: MCP finds files only where nothing else may stand.
        (kind,) = [kind for kind in block._api_info.pop("oneOf", [block._api_info]) if kind != {"type": "null"}]
        block.label, block._api_info = name, {**kind, "additional_description": text}
    for number, line in zip(event["outputs"], results):
        name, text = line.split(": ", 1)
        page.blocks[number].label = name
        page.blocks[number]._api_info["description"] = text


# What goes in. All raise SettingsError.


def _path(name: str, file: Any) -> str:
    """Where an uploaded file lies. Gradio checks that only if the file is marked as one."""
    try:
        return FileData.model_validate(file, context={"validate_meta": True}).path
    except ValidationError as error:
        raise SettingsError(f"{name} is not an uploaded file") from error


def _plan(gamma1: Any, gamma2: Any, start: Any, steps: Any) -> SamplingPlan:
    if not isinstance(start, list) or not isinstance(steps, list) or (len(start), len(steps)) != (3, 3):
        raise SettingsError("start and steps are lists of three whole numbers")
    return plan_of([gamma1, gamma2, *start, *steps])


def _by_hand(groups: Any) -> ByHand:
    """{"7": "hard"} as {7: 2}."""
    try:
        return {int(index): GROUPS.index(group) for index, group in groups.items()}
    except (AttributeError, TypeError, ValueError) as error:
        example = f'{{"7": "hard"}}, of a patch and one of {", ".join(GROUPS)}'
        raise SettingsError(f"by_hand={str(groups)[:80]} is not like {example}") from error


def _confidences(values: Any) -> Tensor:
    if not isinstance(values, list) or not values or any(type(value) not in (int, float) for value in values):
        raise SettingsError("confidence is not a list of numbers")
    if len(values) > MAX_CONFIDENCES:
        raise SettingsError(f"{len(values):,} confidences are too many; the limit is {MAX_CONFIDENCES:,}")
    try:
        return tensor([float(value) for value in values])
    except OverflowError as error:  # a whole number may have any length
        raise SettingsError("confidence is not a list of numbers in [0, 1]") from error


def _assign(confidence: Tensor, plan: SamplingPlan, by_hand: ByHand) -> Tensor:
    try:
        return assign(confidence, plan, by_hand)
    except ValueError as error:
        raise SettingsError(str(error)) from error


# What goes out


def _handed(path: Path) -> dict:
    return FileData(path=str(path), orig_name=path.name).model_dump()


def _drawn(overlay: Any, name: str) -> dict:
    path = new_folder() / f"{name}_qmap.png"
    overlay.save(path)
    return _handed(path)


def _result(request: RunRequest, result: Result) -> tuple[dict, dict]:
    picture = result.picture
    report = {
        "width": picture.width,
        "height": picture.height,
        **result.report(),
        "by_hand": _named(request.by_hand),
        "notes": list(picture.notes),
    }
    return _handed(save_final(result, _name(request.source))), report


def _grouped(plan: SamplingPlan, assignment: Tensor, by_hand: ByHand) -> dict[str, Any]:
    counts = assignment.bincount(minlength=len(GROUPS)).tolist()
    return {
        "plan": asdict(plan),
        "by_hand": _named(by_hand),
        "counts": dict(zip(GROUPS, counts)),
        "assignment": [GROUPS[group] for group in assignment.tolist()],
        "evaluations": plan.evaluations(counts),
        "uniform_evaluations": SamplingPlan.uniform().evaluations(counts),
    }


def _grid(grid: PatchGrid) -> dict[str, Any]:
    """In pixels of the output. The last patches may reach beyond a picture that is no multiple of 8."""
    return {
        "patch": LATENT_PIXELS * grid.size,
        "left": sorted({LATENT_PIXELS * patch.left for patch in grid.patches}),
        "top": sorted({LATENT_PIXELS * patch.top for patch in grid.patches}),
    }


def _named(by_hand: ByHand) -> dict[str, str]:
    return {str(index): GROUPS[group] for index, group in by_hand.items()}


def _name(source: str) -> str:
    """What the files made from this one are called after."""
    return stem(source.removesuffix(ANALYSIS))
