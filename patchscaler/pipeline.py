"""The pipeline of the paper's Figure 2: restore coarsely, judge, and refine each patch by its difficulty.

B batch, N patches, C channels, H W pixels, h w latents, V patch side, T timesteps, K priors, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor

from patchscaler.batches import Patches, Step, make_batches, patch_bytes, sample_batches
from patchscaler.color import add_detail, wavelet_color_fix
from patchscaler.devices import HostCopies, Laps, advised, beside, fitting_batch, halving, to_device
from patchscaler.figures import priors_sheet
from patchscaler.grouping import GROUPS, SamplingPlan, assign, times_and_steps
from patchscaler.images import Picture, bicubic, picture_from_pil, read_picture
from patchscaler.interrupts import still_wanted
from patchscaler.making import Made, all_finite, require_finite
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
from patchscaler.predictors import record
from patchscaler.records import Analysis, GroupReport, Partial, Progress, Restored, Result, Sampled
from patchscaler.retrieval import Priors, retrieve
from patchscaler.sampling import Scheduler, alphas_cumprod, widened
from patchscaler.tiles import Local, tiled

SCALE = 4
TILE = 256  # cells along the side of a tile: of 2048 pixels
LEAST_TILE = 16  # cells; what its surroundings cost is then most of it


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
        """Have `torch.compile` make Patch-DiT faster, for batches of any size; the first batches wait for it.

        On a CUDA GPU its small batches are recorded as well, and then replayed, unless several devices refine.
        """
        for network in (self.transformer, *self.copies):
            network.compile(dynamic=True)
        if self._execution_device.type == "cuda" and not self.copies:
            record(self.transformer)

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
    @advised
    def analyze(self, picture: Picture, batch_size: int | None = None) -> Analysis:
        """Everything before sampling, independent of any plan. RuntimeError if the networks give NaN."""
        device, batch_size = self._execution_device, self.fitting_batch(batch_size)
        host, laps = HostCopies(device), Laps(device)

        # 1. Upscale with bicubic interpolation, fill up to whole latent cells and one patch, and encode.
        upscaled = bicubic(to_device(picture.rgb[None], device), SCALE)  # 1x3xHxW
        enlarged = host.take(upscaled[0])  # 3xHxW
        height, width = upscaled.shape[-2:]
        grid = PatchGrid.covering(height, width, self.transformer.config.size)
        beyond = (0, LATENT_PIXELS * grid.width - width, 0, LATENT_PIXELS * grid.height - height)
        padded = F.pad(upscaled, beyond, mode="replicate")  # 1x3x8hx8w
        y_lr = self.by_tiles(self.encoding, padded)  # 1xCxhxw
        del padded
        laps.mark()

        # 2. Restore, with a confidence (Eq. 1).
        y0, confidence = self.by_tiles(self.restoring, y_lr).split([y_lr.shape[1], 1], dim=1)  # 1xCxhxw, 1x1xhxw
        finite = {"the restored latent": all_finite(y0), "the confidence": all_finite(confidence)}
        finite = {name: host.take(each) for name, each in finite.items()}
        latents, judged = host.take(y0[0]), host.take(confidence[0].clone())  # not with the latents in tow
        laps.mark()

        # 3. Cut into overlapping patches and prompt each with the texture priors that it resembles.
        patches = split(y0[0], grid)  # NxCxVxV
        patch_confidence = host.take(split(confidence[0], grid).mean((1, 2, 3)))  # N
        priors, prompt = self.prompt(patches, batch_size, host)
        prompt = host.take(prompt)
        laps.mark()

        # 4. Decode the coarse image.
        coarse = host.take(self._decoded(y0[0], upscaled[0]))  # 3xHxW
        laps.mark(host.stream)

        host.wait()
        for name, each in finite.items():
            require_finite(name, each)
        return Analysis(
            picture=picture,
            latents=latents,
            confidence=judged,
            grid=grid,
            patch_confidence=patch_confidence,
            priors=Priors.joined(priors),
            prompt=prompt,
            bicubic=enlarged,
            coarse=coarse,
            seconds=dict(zip(("encode", "restore", "retrieve", "decode"), laps.seconds(), strict=True)),
        )

    @torch.inference_mode()
    @advised
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

        A patch's result depends on its y0, confidence, prompt, (T, N) and the seed only. Close the generator to stop
        early. Raises RuntimeError rather than return pixels that are NaN, and OutOfMemory if memory is short for the
        smallest batches and tiles.

        Args:
            color_fix: give the output the structure of the coarse picture (`add_detail`) and the low frequencies of
                the bicubic upscale. Without it, it is what the decoder makes of the refined latent.
            by_hand: the groups of some patches, by index, in place of those that their confidence gives.
            earlier: patches of a run over the same analysis. Those with the same T, N and seed are taken over;
                on a CPU the result is bit by bit that of a full run.
            partial: also yield a Partial after every group that changed a patch, but for the last such group. On a
                CUDA GPU it is made while the next group is sampled, and comes in between that group's steps.
        """
        device, batch_size = self._execution_device, self.fitting_batch(batch_size)
        grid = analysis.grid

        # 1. Group the patches by confidence (Eq. 2), and see which of them are new.
        assignment = assign(analysis.patch_confidence, plan, by_hand)  # N
        start, steps = times_and_steps(plan, assignment)  # N, N
        latents = to_device(analysis.latents, device)  # Cxhxw
        y0 = split(latents, grid)  # NxCxVxV
        if earlier is None:
            rendered, x0 = torch.ones(len(grid), dtype=torch.bool), y0.clone()  # N, NxCxVxV
        else:
            rendered = earlier.differs(start, steps, seed)
            x0 = torch.where(to_device(rendered, device)[:, None, None, None], y0, to_device(earlier.patches, device))

        # 2. Decode the coarse picture once if it did not come along: all pictures below take their structure from it.
        laps, wanted = Laps(device), None
        if color_fix:
            upscaled = to_device(analysis.bicubic, device)  # 3xHxW
            if analysis.coarse is None:
                coarse = self._decoded(latents, upscaled)  # 3xHxW
                laps.mark()
            else:
                coarse = to_device(analysis.coarse, device)
            wanted = coarse[None], upscaled[None]

        # 3. Draw one noise for the whole latent, on the CPU, to have the same for every batch and device.
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(latents.shape, generator=generator, pin_memory=device.type == "cuda")
        noise = split(to_device(drawn, device), grid)  # NxCxVxV
        noise = self.widened(noise, y0, split(to_device(analysis.confidence, device), grid), start)

        # 4. Sample each group from its own shortcut (Eq. 6, 7), in its own number of steps.
        prompt = self.prompt(y0, batch_size)[1] if analysis.prompt is None else to_device(analysis.prompt, device)
        patches = Patches(y0, noise, prompt, x0)
        members = {group: ((assignment == group) & rendered).nonzero()[:, 0] for group in range(len(GROUPS))}
        members = {group: indices for group, indices in members.items() if len(indices)}
        # Groups that share a batch are finished together, so for the picture after each group they do not.
        runs = [{group: indices} for group, indices in members.items()] if partial else [members]
        total = int(steps[rendered].sum())
        done, until, spent, finished = 0, 0, dict.fromkeys(range(len(GROUPS)), 0.0), ~rendered
        busy = [0.0] * (1 + len(self.copies))  # seconds of each device
        each = torch.zeros(len(grid), dtype=torch.float64) if earlier is None else earlier.seconds.clone()  # N
        decode = 0.0
        making: tuple[int, Sampled, Made] | None = None  # the picture after a group
        for run in runs:
            until += sum(plan.steps[group] * len(indices) for group, indices in run.items())
            for step in chain([Step()], self.sample(patches, run, plan, batch_size)):
                done += step.evaluations
                busy[step.device] += sum(step.seconds.values())
                for group, k in step.steps.items():
                    spent[group] += step.seconds[group]
                    each[members[group]] = spent[group] / len(members[group])
                    yield Progress(group, k, plan.steps[group], step.patches[group], done, total)
                if making and (making[-1].over() or done == until):
                    (group, sampled, made), making = making, None
                    decode += made.wait()[0]
                    yield Partial(group, made.picture, replace(sampled, patches=made.patches))
            if partial and done < total:
                (group,) = run
                finished = finished | (assignment == group)
                sampled = Sampled(x0.clone(), start * finished, steps * finished, seed, each.clone())
                with beside(device):
                    making = group, sampled, self._finish(analysis, sampled.patches, wanted)

        # 5. Blend the overlapping patches once, decode, and take the colours and the transparency of the input.
        made = self._finish(analysis, x0, wanted)
        seconds, color = made.wait()
        decode += seconds + sum(laps.seconds())

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
            picture=made.picture,
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
            sampled=Sampled(made.patches, start, steps, seed, each),
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

    def _finish(self, analysis: Restored, x0: Tensor, wanted: tuple[Tensor, Tensor] | None) -> Made:
        """Patches NxCxVxV as the upscaled picture, which takes structure and colours of two others 1x3xHxW."""
        host, laps = HostCopies(x0.device), Laps(x0.device)
        x_hr = merge(x0, analysis.grid)  # Cxhxw
        output = self._decoded(x_hr, analysis.bicubic)[None]  # 1x3xHxW
        laps.mark()
        if wanted is not None:
            coarse, upscaled = wanted
            output = add_detail(coarse, output).clamp_(-1, 1)
            output = wavelet_color_fix(output, upscaled).clamp_(-1, 1)
        finite = {"the refined latent": all_finite(x_hr), "the output": all_finite(output)}
        finite = {name: host.take(each) for name, each in finite.items()}
        alpha = analysis.picture.alpha
        if alpha is not None:
            alpha = bicubic(alpha[None], SCALE)[0].clamp(0, 1)  # 1xHxW
        picture, patches = Picture(host.take(output[0]), alpha, analysis.picture.notes), host.take(x0)
        laps.mark(host.stream)
        return Made(picture, patches, x0, finite, host, laps)

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

    def prompt(self, patches: Tensor, batch_size: int, host: HostCopies | None = None) -> tuple[list[Priors], Tensor]:
        """Algorithm 1 and the texture encoder, in batches: of patches NxCxVxV the prompt NxLxD, on their device.

        With ``host`` also the Priors of every batch, which it brings to the CPU.
        """
        return halving(partial(self._prompt, patches, host), batch_size, 1, patches.device)

    def _prompt(self, patches: Tensor, host: HostCopies | None, batch_size: int) -> tuple[list[Priors], Tensor]:
        found, prompts = [], []
        for batch in patches.split(batch_size):
            still_wanted()
            queries = self.texture_classifier.features(batch)  # NxD
            priors = retrieve(queries, self.texture_memory, self.texture_encoder.config.top_k)
            prompts.append(self.texture_encoder(priors.values, priors.similarities, batch).float())  # NxLxD
            if host:
                found.append(Priors(*map(host.take, (priors.indices, priors.similarities, priors.values))))
        return found, prompts[0] if len(prompts) == 1 else torch.cat(prompts)

    def widened(self, noise: Tensor, y0: Tensor, confidence: Tensor, start: Tensor) -> Tensor:
        """Noise NxCxVxV as wide as the confidence Nx1xVxV says that y0 errs: see `patchscaler.sampling.widened`."""
        return widened(noise, self.grm.expected_error(y0, confidence), start, alphas_cumprod(self.scheduler))

    def sample(
        self, patches: Patches, members: Mapping[int, Tensor], plan: SamplingPlan, batch_size: int
    ) -> Iterator[Step]:
        """Sample the ``members`` of the groups, LongTensors: see `sample_batches`."""
        batches = make_batches(members, plan, batch_size)
        return sample_batches([self.transformer, *self.copies], self.scheduler, plan, patches, batches)
