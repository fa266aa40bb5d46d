"""The API's endpoint. No postponed annotations here: Gradio reads the return type as it stands."""

from collections.abc import Callable

from gradio.data_classes import FileData
from pydantic import ValidationError

from patchscaler.grouping import SamplingPlan
from patchscaler.ui.errors import visible_error
from patchscaler.ui.handlers import Handlers, checked_plan

PAPER = SamplingPlan.paper()


def upscale_endpoint(handlers: Handlers) -> Callable:
    async def upscale(
        image: FileData,
        gamma1: float = PAPER.gamma1,
        gamma2: float = PAPER.gamma2,
        starts: list[int] = list(PAPER.start),  # noqa: B006  never changed
        steps: list[int] = list(PAPER.steps),  # noqa: B006
        seed: int = 0,
    ) -> tuple[FileData, dict]:
        """Upscale an image four times. Confidence above gamma1 makes a patch simple, up to gamma2 hard. `starts` (1 to 1000) and `steps` (1 to start) hold one number each for simple, medium and hard patches. Returns a lossless PNG and a report with the plan and the seconds of every group and stage."""  # noqa: E501
        # Gradio checks where a file lies only if it is marked as one; without this a bare path would be read.
        try:
            source = FileData.model_validate(image, context={"validate_meta": True}).path
        except ValidationError as error:
            raise visible_error("No image", "image is not an uploaded file") from error
        if not isinstance(starts, list) or not isinstance(steps, list) or (len(starts), len(steps)) != (3, 3):
            raise visible_error("These settings do not work", "starts and steps are lists of three whole numbers")
        plan, seed = checked_plan([gamma1, gamma2, *starts, *steps], seed)
        path, report = await handlers.upscale(source, plan, seed)
        return FileData(path=str(path), orig_name=path.name).model_dump(), report

    return upscale
