"""The pipeline of the paper's Figure 2: restore coarsely, and refine each patch by its difficulty.

B batch, N patches, C channels, H W pixels, h w latents, V patch side, T timesteps, K priors, D width.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor

from patchscaler.cancellation import check_cancelled
from patchscaler.color import colored
from patchscaler.device import Stopwatch, batch_for, halving, raises_out_of_memory
from patchscaler.figures import priors_sheet
from patchscaler.images import Picture, bicubic, picture_from_pil, read_picture
from patchscaler.models import (
    GRM,
    PatchDiT,
    TextureClassifier,
    TextureEncoder,
    TextureMemory,
    decode_latents,
    encode_latents,
)
from patchscaler.patches import LATENT_PIXELS, PatchGrid, merge, split
from patchscaler.plan import GROUPS, SamplingPlan, assign, times_and_steps
from patchscaler.results import (
    STAGES,
    Analysis,
    GroupReport,
    Partial,
    Progress,
    Restored,
    Result,
    Sampled,
    require_finite,
)
from patchscaler.retrieval import Priors, retrieve
from patchscaler.sampling import (
    Batch,
    Patches,
    Scheduler,
    Step,
    check_schedule,
    make_batches,
    noise_generator,
    sample_batches,
)
from patchscaler.several import sample_on_several
from patchscaler.tiles import Local, tiled

SCALE = 4
TILE = 256  # cells along the side of a tile: of 2048 pixels
MIN_TILE = 16  # cells; what its surroundings cost is then most of it


class PatchScalerPipeline(DiffusionPipeline):
    """x4 super-resolution of photographs of any size, by patch-adaptive group sampling.

    Each network runs in its own dtype; latents between them are float32. `vae` may be any diffusers
    autoencoder with 8 pixels per latent cell; an AutoencoderKL is set to tile large pictures itself. `scheduler` is
    one that `patchscaler.sampling` takes, with the betas that Patch-DiT was trained with; else ValueError. Analysis and
    refinement change nothing in the pipeline, so threads may share it.
    """

    def __init__(
        self,
        vae: ModelMixin,
        grm: GRM,
        transformer: PatchDiT,
        texture_classifier: TextureClassifier,
        texture_encoder: TextureEncoder,
        texture_memory: TextureMemory,
        scheduler: Scheduler,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            grm=grm,
            transformer=transformer,
            texture_classifier=texture_classifier,
            texture_encoder=texture_encoder,
            texture_memory=texture_memory,
            scheduler=scheduler,
        )
        check_schedule(transformer, scheduler)
        if isinstance(vae, AutoencoderKL):  # its normalisation and attention see the whole picture
            vae.enable_tiling()
        self.copies: list[PatchDiT] = []  # of Patch-DiT, on the other devices of `refine_on`

    def refine_on(self, others: Sequence[torch.device | str]) -> None:
        """Refine on these devices besides the pipeline's own, on which the rest stays.

        Each is given a copy of Patch-DiT and, batch by batch, the largest of a group's batches that is left. To run
        several on CPU cores, start Python with OMP_NUM_THREADS at the cores of each.
        """
        self.copies = [copy.deepcopy(self.transformer).to(device) for device in others]

    def compile(self) -> None:
        """Have `torch.compile` make Patch-DiT faster, for batches of any size; the first batches wait for it."""
        for network in (self.transformer, *self.copies):
            network.compile(dynamic=True)

    def fitting_batch(self, asked: int | None = None) -> int:
        """Patches at once: as many as asked for, or what suits the device. Raises ValueError if that is below 1."""
        if asked is None:
            return batch_for(self._execution_device)
        if asked < 1:
            raise ValueError(f"batch_size={asked} is below 1")
        return asked

    def __call__(
        self,
        image: Picture | Image.Image | str | Path | np.ndarray | Tensor,
        plan: SamplingPlan | None = None,
        generator: torch.Generator | int | None = None,
        batch_size: int | None = None,
        color_fix: bool = True,
    ) -> Result:
        """Upscale one image x4. `plan` is the paper's unless given.

        The image is a file, a Picture, a PIL image, an array H×W×3 of uint8 or a tensor 3×H×W in [-1, 1]; TypeError
        for anything else. `generator` is a seed or a source of one; without it the seed is 0, so that the same
        image gives the same result. `batch_size` counts patches; without it, it is what suits the device.
        `color_fix` is as in `refine`. Raises ImageError for an unreadable image and RuntimeError if the networks
        give NaN.
        """
        # 1. Read the image, restore it coarsely, with a confidence, and look up texture priors.
        analysis = self.analyze(image, batch_size)
        # 2. Refine the patches, group by group, and assemble them.
        if isinstance(generator, torch.Generator):
            generator = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
        *_, result = self.refine(analysis, plan or SamplingPlan.paper(), generator or 0, batch_size, color_fix)
        return result

    @torch.inference_mode()
    @raises_out_of_memory
    def analyze(
        self, image: Picture | Image.Image | str | Path | np.ndarray | Tensor, batch_size: int | None = None
    ) -> Analysis:
        """Everything before sampling, independent of any plan. The image and the errors are those of a call."""
        picture = as_picture(image)
        device, batch_size = self._execution_device, self.fitting_batch(batch_size)
        clock = Stopwatch(device)

        # 1. Upscale with bicubic interpolation, fill up to whole latent cells and one patch, and encode.
        upscaled = bicubic(picture.visible_rgb()[None].to(device), SCALE)  # 1×3×H×W
        height, width = upscaled.shape[-2:]
        grid = PatchGrid.covering(height, width, self.transformer.config.size)
        beyond = (0, LATENT_PIXELS * grid.width - width, 0, LATENT_PIXELS * grid.height - height)
        y_lr = self.by_tiles(self.encoding, F.pad(upscaled, beyond, mode="replicate"))  # 1×C×h×w
        enlarged = upscaled[0].cpu()  # 3×H×W
        clock.lap("encode")

        # 2. Restore, with a confidence (Eq. 1).
        y0, confidence = self.by_tiles(self.restoring, y_lr).split([y_lr.shape[1], 1], dim=1)  # 1×C×h×w, 1×1×h×w
        require_finite("the restored latent", y0)
        require_finite("the confidence", confidence)
        clock.lap("restore")

        # 3. Cut into overlapping patches and prompt each with the texture priors that it resembles.
        patch_confidence = split(confidence[0], grid).mean((1, 2, 3)).cpu()  # N
        priors, prompt = self.prompt(split(y0[0], grid), batch_size)
        prompt = prompt.cpu()  # N×L×D
        clock.lap("retrieve")

        # 4. Decode the coarse image.
        coarse = self._decoded(y0[0], height, width).cpu().contiguous()  # 3×H×W
        clock.lap("decode")

        return Analysis(
            picture=picture,
            latents=y0[0].cpu(),
            confidence=confidence[0].cpu().clone(),  # on the CPU a view, which would keep y0 alive with it
            grid=grid,
            patch_confidence=patch_confidence,
            priors=priors,
            prompt=prompt,
            bicubic=enlarged,
            coarse=coarse,
            seconds=dict(clock.seconds),
        )

    @torch.inference_mode()
    @raises_out_of_memory
    def refine(
        self,
        analysis: Restored,
        plan: SamplingPlan,
        seed: int = 0,
        batch_size: int | None = None,
        color_fix: bool = True,
        by_hand: Mapping[int, int] | None = None,
        earlier: Sampled | None = None,
        partial: bool = False,
    ) -> Iterator[Progress | Partial | Result]:
        """Yield Progress after every denoising step of every batch, and last the Result.

        A patch's result depends on its y0, its prompt, its (T, N) and the noise at its place only. Close the generator
        to stop early. Raises ValueError for a seed outside 0..2^63-1, RuntimeError rather than return pixels that are
        NaN, and OutOfMemory if memory is short for the smallest batches and tiles.

        Args:
            color_fix: give the output the low frequencies, and so the colours, of the bicubic upscale. Without it,
                it is what the decoder makes of the refined latent.
            by_hand: the groups of some patches, by index, in place of those that their confidence gives.
            earlier: patches of a run over the same analysis. Those with the same T, N and seed are taken over;
                on a CPU the result is bit by bit that of a full run.
            partial: also yield a Partial after every group that changed a patch, but for the last such group.
        """
        device, batch_size = self._execution_device, self.fitting_batch(batch_size)
        clock = Stopwatch(device)
        grid = analysis.grid
        check_schedule(self.transformer, self.scheduler)

        # 1. Group the patches by confidence (Eq. 2), and see which of them are not taken from an earlier run.
        assignment = assign(analysis.patch_confidence, plan, by_hand)  # N
        start, steps = times_and_steps(plan, assignment)  # N, N
        rendered = torch.ones_like(start, dtype=torch.bool) if earlier is None else earlier.differs(start, steps, seed)
        batches = make_batches(assignment, plan, batch_size, rendered)

        # 2. Start: y0, the prompts, and one noise for the whole latent, which is drawn on the CPU to be the same for
        # every batch and device.
        y0 = split(analysis.latents.to(device), grid)  # N×C×V×V
        drawn = torch.randn(analysis.latents.shape, generator=noise_generator(seed))
        noise = split(drawn.to(device), grid)  # N×C×V×V
        clock.lap("refine")
        prompt = self.prompt(y0, batch_size)[1] if analysis.prompt is None else analysis.prompt.to(device)  # N×L×D
        clock.lap("retrieve")
        patches = Patches(y0, noise, prompt, x0=y0.clone(), seconds=torch.zeros(len(grid)))
        if earlier is not None:
            patches.x0[(~rendered).to(device)] = earlier.patches[~rendered].to(device)
            patches.seconds[~rendered] = earlier.seconds[~rendered]

        # 3. Sample each group from its own shortcut (Eq. 6, 7), in its own number of steps.
        done, total = 0, int(steps[rendered].sum())
        for group in range(len(GROUPS)):
            for step in self.sample(patches, [batch for batch in batches if batch.group == group]):
                done += step.evaluations
                clock.lap("refine")
                if step.evaluations > 0:
                    yield Progress(group, step.step, plan.steps[group], len(step.batch), done, total)
                    clock.lap()  # what the reader of the events does is not counted
            if partial and (rendered & (assignment == group)).any() and done < total:
                ready = ~rendered | (assignment <= group)  # N
                sampled = Sampled(patches.x0.cpu().clone(), start * ready, steps * ready, seed, patches.seconds.clone())
                yield Partial(group, self._assembled(analysis, patches.x0, color_fix, clock), sampled)
                clock.lap()

        # 4. to 6. Merge, decode and colour.
        picture = self._assembled(analysis, patches.x0, color_fix, clock)
        counts = assignment.bincount(minlength=len(GROUPS)).tolist()
        members = [rendered & (assignment == group) for group in range(len(GROUPS))]  # N each
        evaluations = [int(steps[each].sum()) for each in members]
        spent = [patches.seconds[each].sum().item() for each in members]
        yield Result(
            picture=picture,
            plan=plan,
            seed=seed,
            assignment=assignment,
            groups=[*map(GroupReport, GROUPS, counts, plan.start, plan.steps, evaluations, spent)],
            seconds={name: analysis.seconds.get(name, 0.0) + clock.seconds[name] for name in STAGES},
            device=str(device),
            dtype=str(self.transformer.dtype).removeprefix("torch."),
            sampled=Sampled(patches.x0.cpu(), start, steps, seed, patches.seconds),
            rendered=rendered,
            color_fix=color_fix,
            by_hand=dict(by_hand or {}),
        )

    @torch.inference_mode()
    def prior_images(self, indices: Tensor) -> Tensor:
        """Images K×3×8V×8V in [-1, 1] of K rows of the texture memory (one patch's priors), on the CPU."""
        return decode_latents(self.vae, self.texture_memory.patches(indices.to(self._execution_device))).cpu()

    def draw_priors(
        self, analysis: Analysis, rows: int = 4, prior_images: Callable[[Tensor], Tensor] | None = None
    ) -> Image.Image:
        """A sheet of the priors of a few patches, evenly spread from the least to the most confident.

        `prior_images` takes the place of the method of that name, for instance to decode on another device.
        """
        prior_images = prior_images or self.prior_images
        order = analysis.patch_confidence.argsort()
        chosen = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).round().long()].tolist()
        pictures = [prior_images(analysis.priors.indices[index]) for index in chosen]
        queries = [analysis.grid.patches[index].pixels(analysis.coarse) for index in chosen]
        return priors_sheet(pictures, analysis.priors.similarities[chosen], queries)

    def _assembled(self, analysis: Restored, x0: Tensor, color_fix: bool, clock: Stopwatch) -> Picture:
        """Steps 4 to 6 of `refine`: patches N×C×V×V as the upscaled picture, on the CPU."""
        # 4. Merge: blend the overlapping patches.
        x_hr = merge(x0, analysis.grid)  # C×h×w
        require_finite("the refined latent", x_hr)
        # 5. Decode.
        output = self._decoded(x_hr, *analysis.bicubic.shape[-2:])  # 3×H×W
        clock.lap("decode")
        # 6. Colour: take the colours and the transparency of the input.
        output = colored(output, analysis.bicubic, color_fix, analysis.picture.is_grey())
        require_finite("the output", output)
        alpha = analysis.picture.alpha
        if alpha is not None:
            alpha = bicubic(alpha[None], SCALE)[0].clamp(0, 1)  # 1×H×W
        picture = Picture(output.cpu().contiguous(), alpha, analysis.picture.notes)
        clock.lap("color")
        return picture

    def _decoded(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The picture 3×H×W of latents C×h×w, which may reach beyond it."""
        return self.by_tiles(self.decoding, latents[None])[0, :, :height, :width]

    @property
    def encoding(self) -> Local:
        """Images 1×3×8h×8w to latents 1×C×h×w."""
        return Local(self.vae, "encode", lambda x: encode_latents(self.vae, x), before=LATENT_PIXELS, after=1)

    @property
    def restoring(self) -> Local:
        """Latents 1×C×h×w to restored ones and their confidence: 1×(C+1)×h×w, float32."""
        return Local(self.grm, "restore", self._restore, before=1, after=1)

    @property
    def decoding(self) -> Local:
        """Latents 1×C×h×w to images 1×3×8h×8w."""
        return Local(self.vae, "decode", lambda x: decode_latents(self.vae, x), before=1, after=LATENT_PIXELS)

    def _restore(self, y_lr: Tensor) -> Tensor:
        restored = self.grm(y_lr)
        return torch.cat([restored.latents.float(), restored.confidence], dim=1)

    def by_tiles(self, local: Local, values: Tensor) -> Tensor:
        """`local.run(values)` in tiles, smaller ones when memory is short."""
        side = min(TILE, max(values.shape[-2:]) // local.before)
        return halving(lambda side: tiled(local, values, side), side, MIN_TILE, values.device)

    def prompt(self, patches: Tensor, batch_size: int) -> tuple[Priors, Tensor]:
        """Algorithm 1 and the texture encoder, in batches: the Priors of patches N×C×V×V, on the CPU, and the prompt
        N×L×D on the device of the patches.
        """
        return halving(lambda size: self._prompt(patches, size), batch_size, 1, patches.device)

    def _prompt(self, patches: Tensor, batch_size: int) -> tuple[Priors, Tensor]:
        parts = []
        for batch in patches.split(batch_size):
            check_cancelled()
            queries = self.texture_classifier.features(batch)  # N×D
            priors = retrieve(queries, self.texture_memory, self.texture_encoder.config.top_k)
            values = self.texture_memory.patches(priors.indices)  # N×K×C×V×V
            prompt = self.texture_encoder(values, priors.similarities, batch).float()  # N×L×D
            parts.append((priors.indices.cpu(), priors.similarities.cpu(), prompt))
        indices, similarities, prompt = map(torch.cat, zip(*parts))
        return Priors(indices, similarities), prompt

    def sample(self, patches: Patches, batches: Sequence[Batch]) -> Iterator[Step]:
        """Sample batches of the patches on all devices: see `sample_batches`."""
        if self.copies:
            return sample_on_several([self.transformer, *self.copies], self.scheduler, patches, batches)
        return sample_batches(self.transformer, self.scheduler, patches, deque(batches))


def as_picture(image: Picture | Image.Image | str | Path | np.ndarray | Tensor) -> Picture:
    """What the pipeline may be given, as a Picture. ImageError for an unreadable file, TypeError for anything else."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, (str, Path)):
        return read_picture(image)
    if isinstance(image, Image.Image):
        return picture_from_pil(image)
    said = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return picture_from_pil(Image.fromarray(image))
        said = f"an array {'×'.join(map(str, image.shape))} of {image.dtype}"
    elif isinstance(image, Tensor):
        said = f"a tensor {'×'.join(map(str, image.shape))} of {str(image.dtype).removeprefix('torch.')}"
        if image.dtype.is_floating_point and image.ndim == 3 and image.shape[0] == 3 and image.numel():
            rgb = image.detach().float().cpu()
            if rgb.abs().max() <= 1:  # nor is NaN
                return Picture(rgb)
            said += f" from {rgb.min().item():g} to {rgb.max().item():g}"
    raise TypeError(
        f"the image is {said}; it must be a path, a PIL image, a Picture, an array H×W×3 of uint8, or a tensor 3×H×W "
        "in [-1, 1]"
    )
