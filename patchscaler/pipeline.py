"""The pipeline of the paper's Figure 2: restore coarsely, judge, and refine each patch by its difficulty.

B batch, N patches, C channels, H W pixels, h w latents, V patch side, T timesteps, K priors, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor

from patchscaler.batches import Patches, Step, make_batches, patch_bytes, sample_batches
from patchscaler.color import add_detail, wavelet_color_fix
from patchscaler.devices import Stopwatch, advising, fitting_batch, halving
from patchscaler.figures import priors_sheet
from patchscaler.grouping import GROUPS, SamplingPlan, assign, times_and_steps
from patchscaler.images import Picture, bicubic, picture_from_pil, read_picture
from patchscaler.interrupts import still_wanted
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
from patchscaler.records import Analysis, GroupReport, Partial, Progress, Restored, Result, Sampled
from patchscaler.retrieval import Priors, retrieve
from patchscaler.sampling import Scheduler, alphas_cumprod, widened
from patchscaler.tiles import Local, tiled

SCALE = 4
TILE = 256  # cells along the side of a tile: of 2048 pixels
LEAST_TILE = 16  # cells; what its surroundings cost is then most of it


def _advised(method: Callable) -> Callable:
    """When memory runs out in a method or generator of the pipeline, say so and what helps: OutOfMemory."""

    @wraps(method)
    def call(self: PatchScalerPipeline, *args: Any, **options: Any) -> Any:
        with advising(self._execution_device):
            return method(self, *args, **options)

    @wraps(method)
    def iterate(self: PatchScalerPipeline, *args: Any, **options: Any) -> Iterator[Any]:
        with advising(self._execution_device):
            yield from method(self, *args, **options)

    return iterate if isgeneratorfunction(method) else call


class PatchScalerPipeline(DiffusionPipeline):
    """x4 super-resolution of photographs of any size, by patch-adaptive group sampling.

    Each network runs in its own dtype; latents between them are float32. ``vae`` may be any diffusers
    autoencoder with 8 pixels per latent cell; ``scheduler`` is one that `patchscaler.sampling` takes. No call
    changes the pipeline, so threads may share it.
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
        self.copies: list[PatchDiT] = []  # of Patch-DiT, on the other devices of `refine_on`

    def refine_on(self, others: Sequence[torch.device | str]) -> None:
        """Refine on these devices besides the pipeline's own, on which the rest stays.

        Each is given a copy of Patch-DiT and, batch by batch, what is costliest of the patches left. To run several on
        CPU cores, start Python with OMP_NUM_THREADS at the cores of each.
        """
        self.copies = [copy.deepcopy(self.transformer).to(device) for device in others]

    def compile(self) -> None:
        """Have `torch.compile` make Patch-DiT faster, for batches of any size; the first batches wait for it."""
        for network in (self.transformer, *self.copies):
            network.compile(dynamic=True)

    def fitting_batch(self, asked: int | None = None) -> int:
        """Patches at once: as many as asked for, or what suits the device. Raises ValueError if that is below 1."""
        if asked is None:
            tokens = self.texture_encoder.config
            length = tokens.top_k * (tokens.size // tokens.patch) ** 2
            return fitting_batch(self._execution_device, patch_bytes(self.transformer, length))
        if asked < 1:
            raise ValueError(f"batch_size={asked} is below 1")
        return asked

    def __call__(
        self,
        image: Picture | Image.Image | str | Path,
        plan: SamplingPlan | None = None,
        generator: torch.Generator | int | None = None,
        batch_size: int | None = None,
    ) -> Result:
        """Upscale one image x4. ``plan`` is the paper's unless given.

        ``generator`` is a seed or a source of one; without it the seed is 0, so that the same image gives the
        same result. ``batch_size`` counts patches; without it, it is what suits the device. Raises ImageError for
        an unreadable image and RuntimeError if the networks give NaN.
        """
        # 1. Read the image.
        if isinstance(image, (str, Path)):
            image = read_picture(image)
        elif isinstance(image, Image.Image):
            image = picture_from_pil(image)
        # 2. Restore it coarsely, judge the restoration and look up texture priors.
        analysis = self.analyze(image, batch_size)
        # 3. Refine the patches, group by group, and assemble them.
        if isinstance(generator, torch.Generator):
            generator = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
        *_, result = self.refine(analysis, plan or SamplingPlan.paper(), generator or 0, batch_size)
        return result

    @torch.inference_mode()
    @_advised
    def analyze(self, picture: Picture, batch_size: int | None = None) -> Analysis:
        """Everything before sampling, independent of any plan. RuntimeError if the networks give NaN."""
        device, batch_size = self._execution_device, self.fitting_batch(batch_size)
        clock = Stopwatch(device)
        seconds = {}

        # 1. Upscale with bicubic interpolation, fill up to whole latent cells and one patch, and encode.
        upscaled = bicubic(picture.rgb[None].to(device), SCALE)  # 1x3xHxW
        height, width = upscaled.shape[-2:]
        grid = PatchGrid.covering(height, width, self.transformer.config.size)
        beyond = (0, LATENT_PIXELS * grid.width - width, 0, LATENT_PIXELS * grid.height - height)
        padded = F.pad(upscaled, beyond, mode="replicate")  # 1x3x8hx8w
        y_lr = self.by_tiles(self.encoding, padded)  # 1xCxhxw
        del padded
        seconds["encode"] = clock.lap()

        # 2. Restore, with a confidence (Eq. 1).
        y0, confidence = self.by_tiles(self.restoring, y_lr).split([y_lr.shape[1], 1], dim=1)  # 1xCxhxw, 1x1xhxw
        require_finite("the restored latent", y0)
        require_finite("the confidence", confidence)
        seconds["restore"] = clock.lap()

        # 3. Cut into overlapping patches and prompt each with the texture priors that it resembles.
        patches = split(y0[0], grid)  # NxCxVxV
        patch_confidence = split(confidence[0], grid).mean((1, 2, 3))  # N
        priors, prompt = self._prompt(patches, batch_size)
        seconds["retrieve"] = clock.lap()

        # 4. Decode the coarse image.
        coarse = self._decoded(y0[0], upscaled[0])  # 3xHxW
        seconds["decode"] = clock.lap()

        return Analysis(
            picture=picture,
            latents=y0[0].cpu(),
            confidence=confidence[0].cpu().clone(),  # not with the latents in tow
            grid=grid,
            patch_confidence=patch_confidence.cpu(),
            priors=priors,
            prompt=prompt,
            bicubic=upscaled[0].cpu(),
            coarse=coarse.cpu().contiguous(),
            seconds=seconds,
        )

    @torch.inference_mode()
    @_advised
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

        A patch's result depends on its content, prompt, (T, N) and the seed only. Close the generator to stop
        early. Raises RuntimeError rather than return pixels that are NaN, and OutOfMemory if memory is short for the
        smallest batches and tiles.

        Args:
            color_fix: give the output the structure of the coarse picture (`add_detail`) and the low frequencies of
                the bicubic upscale. Without it, it is what the decoder makes of the refined latent.
            by_hand: the groups of some patches, by index, in place of those that their confidence gives.
            earlier: patches of a run over the same analysis. Those with the same T, N and seed are taken over;
                on a CPU the result is bit by bit that of a full run.
            partial: also yield a Partial after every group that changed a patch, but for the last such group.
        """
        device, batch_size = self._execution_device, self.fitting_batch(batch_size)
        clock = Stopwatch(device)
        grid = analysis.grid

        # 1. Group the patches by confidence (Eq. 2), and see which of them are new.
        assignment = assign(analysis.patch_confidence, plan, by_hand)  # N
        start, steps = times_and_steps(plan, assignment)  # N, N
        y0 = split(analysis.latents, grid)  # NxCxVxV
        if earlier is None:
            rendered = torch.ones(len(grid), dtype=torch.bool)
            earlier = Sampled(y0, torch.zeros_like(start), torch.zeros_like(steps), seed)
        else:
            rendered = earlier.differs(start, steps, seed)

        # 2. Decode the coarse picture once if it did not come along: all pictures below take their structure from it.
        decode = 0.0
        if color_fix and analysis.coarse is None:
            analysis = replace(analysis, coarse=self._decoded(analysis.latents.to(device), analysis.bicubic).cpu())
            decode = clock.lap()

        # 3. Draw one noise for the whole latent, on the CPU, to have the same for every batch and device.
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = split(torch.randn(analysis.latents.shape, generator=generator), grid)  # NxCxVxV
        noise = self.widened(noise, y0, split(analysis.confidence, grid), start)

        # 4. Sample each group from its own shortcut (Eq. 6, 7), in its own number of steps.
        x0 = torch.where(rendered[:, None, None, None], y0, earlier.patches).to(device)  # NxCxVxV
        prompt = self._prompt(y0.to(device), batch_size)[1] if analysis.prompt is None else analysis.prompt  # NxLxD
        patches = Patches(y0, noise, prompt, x0)
        members = {group: ((assignment == group) & rendered).nonzero()[:, 0] for group in range(len(GROUPS))}
        members = {group: indices for group, indices in members.items() if len(indices)}
        # Groups that share a batch are finished together, so for the picture after each group they do not.
        runs = [{group: indices} for group, indices in members.items()] if partial else [members]
        total = int(steps[rendered].sum())
        done, spent, finished = 0, dict.fromkeys(range(len(GROUPS)), 0.0), ~rendered
        busy = [0.0] * (1 + len(self.copies))  # seconds of each device
        for run in runs:
            for step in self.sample(patches, run, plan, batch_size):
                done += step.evaluations
                busy[step.device] += sum(step.seconds.values())
                for group, k in step.steps.items():
                    spent[group] += step.seconds[group]
                    yield Progress(group, k, plan.steps[group], step.patches[group], done, total)
            if partial and done < total:
                (group,) = run
                finished = finished | (assignment == group)
                sampled = Sampled(x0.cpu().clone(), start * finished, steps * finished, seed)
                clock.lap()
                picture, seconds, _ = self._finish(analysis, x0, color_fix, clock)
                decode += seconds
                yield Partial(group, picture, sampled)

        # 5. Blend the overlapping patches once, decode, and take the colours and the transparency of the input.
        clock.lap()
        picture, seconds, color = self._finish(analysis, x0, color_fix, clock)
        decode += seconds

        counts = assignment.bincount(minlength=len(GROUPS)).tolist()
        groups = [
            GroupReport(
                name,
                counts[group],
                plan.start[group],
                plan.steps[group],
                plan.steps[group] * len(members.get(group, ())),
                spent[group],
            )
            for group, name in enumerate(GROUPS)
        ]
        yield Result(
            picture=picture,
            plan=plan,
            seed=seed,
            assignment=assignment,
            groups=groups,
            seconds={
                **{name: analysis.seconds[name] for name in ("encode", "restore", "retrieve")},
                "refine": max(busy),
                "decode": analysis.seconds["decode"] + decode,
                "color": color,
            },
            device=str(device),
            dtype=str(self.transformer.dtype).removeprefix("torch."),
            sampled=Sampled(x0.cpu(), start, steps, seed),
            rendered=rendered,
            by_hand=dict(by_hand or {}),
        )

    @torch.inference_mode()
    def decode_priors(self, priors: Tensor) -> Tensor:
        """Latent patches KxCxVxV (of one patch's priors) as images Kx3x8Vx8V in [-1, 1], on the CPU."""
        return decode_latents(self.vae, priors.to(self._execution_device)).cpu()

    def draw_priors(self, analysis: Analysis, rows: int = 4) -> Image.Image:
        """A sheet of the priors of a few patches, evenly spread from the least to the most confident."""
        order = analysis.patch_confidence.argsort()
        chosen = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).round().long()].tolist()
        pictures = [self.decode_priors(analysis.priors.values[index]) for index in chosen]
        queries = [analysis.grid.patches[index].pixels(analysis.coarse) for index in chosen]
        return priors_sheet(pictures, analysis.priors.similarities[chosen], queries)

    def _finish(
        self, analysis: Restored, x0: Tensor, color_fix: bool, clock: Stopwatch
    ) -> tuple[Picture, float, float]:
        """Patches NxCxVxV as the upscaled picture, and the seconds of merging and decoding, and of the colours."""
        x_hr = merge(x0, analysis.grid)  # Cxhxw
        require_finite("the refined latent", x_hr)
        output = self._decoded(x_hr, analysis.bicubic)[None]  # 1x3xHxW
        decode = clock.lap()
        if color_fix:
            coarse, upscaled = (image[None].to(output.device) for image in (analysis.coarse, analysis.bicubic))
            output = add_detail(coarse, output).clamp_(-1, 1)
            output = wavelet_color_fix(output, upscaled).clamp_(-1, 1)
        require_finite("the output", output)
        alpha = analysis.picture.alpha
        if alpha is not None:
            alpha = bicubic(alpha[None], SCALE)[0].clamp(0, 1)  # 1xHxW
        picture = Picture(output[0].cpu(), alpha, analysis.picture.notes)
        return picture, decode, clock.lap()

    def _decoded(self, latents: Tensor, image: Tensor) -> Tensor:
        """The picture 3xHxW of latents Cxhxw, which may reach beyond it; `image` has its size."""
        height, width = image.shape[-2:]
        return self.by_tiles(self.decoding, latents[None])[0, :, :height, :width]

    @property
    def encoding(self) -> Local:
        """Images 1x3x8hx8w to latents 1xCxhxw."""
        return Local(self.vae, "encode", partial(encode_latents, self.vae), before=LATENT_PIXELS, after=1)

    @property
    def restoring(self) -> Local:
        """Latents 1xCxhxw to restored ones and their confidence: 1x(C+1)xhxw, float32."""
        return Local(self.grm, "restore", self._restore, before=1, after=1)

    @property
    def decoding(self) -> Local:
        """Latents 1xCxhxw to images 1x3x8hx8w."""
        return Local(self.vae, "decode", partial(decode_latents, self.vae), before=1, after=LATENT_PIXELS)

    def _restore(self, y_lr: Tensor) -> Tensor:
        restored = self.grm(y_lr)
        return torch.cat([restored.latents.float(), restored.confidence], dim=1)

    def by_tiles(self, local: Local, values: Tensor) -> Tensor:
        """``local.run(values)`` in tiles, smaller ones when memory is short."""
        side = min(TILE, max(values.shape[-2:]) // local.before)
        return halving(lambda side: tiled(local, values, side), side, LEAST_TILE, values.device)

    def prompt(self, patches: Tensor, batch_size: int) -> tuple[Priors, Tensor]:
        """Algorithm 1 and the texture encoder, in batches: NxCxVxV -> Priors and prompt NxLxD, on the CPU."""
        return halving(partial(self._prompt, patches), batch_size, 1, patches.device)

    def _prompt(self, patches: Tensor, batch_size: int) -> tuple[Priors, Tensor]:
        found, prompts = [], []
        for batch in patches.split(batch_size):
            still_wanted()
            queries = self.texture_classifier.features(batch)  # NxD
            priors = retrieve(queries, self.texture_memory, self.texture_encoder.config.top_k)
            prompt = self.texture_encoder(priors.values, priors.similarities, batch)  # NxLxD
            prompts.append(prompt.float().cpu())
            found.append((priors.indices.cpu(), priors.similarities.cpu(), priors.values.cpu()))
        return Priors(*(torch.cat(parts) for parts in zip(*found, strict=True))), torch.cat(prompts)

    def widened(self, noise: Tensor, y0: Tensor, confidence: Tensor, start: Tensor) -> Tensor:
        """Noise NxCxVxV as wide as the confidence Nx1xVxV says that y0 errs: see `patchscaler.sampling.widened`."""
        return widened(noise, self.grm.expected_error(y0, confidence), start, alphas_cumprod(self.scheduler))

    def sample(
        self, patches: Patches, members: Mapping[int, Tensor], plan: SamplingPlan, batch_size: int
    ) -> Iterator[Step]:
        """Sample the ``members`` of the groups, LongTensors: see `sample_batches`."""
        batches = make_batches(members, plan, batch_size)
        return sample_batches([self.transformer, *self.copies], self.scheduler, plan, patches, batches)


class NotFiniteError(RuntimeError):
    """The networks gave NaN or infinity; the message says where."""


def require_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise NotFiniteError(f"{name} has values that are NaN or infinite; try dtype=torch.float32")
