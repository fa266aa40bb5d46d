"""Patch-DiT: the diffusion transformer that refines one latent patch at a time (Sections 3.1 to 3.3)."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

TIMESTEPS = 1000  # of the noise schedule that the filter holds
PREDICTABLE = 0.1  # ρ, in units of the latents' deviation; what Patch-DiT adds has .09
PromptKeys = list[tuple[Tensor, Tensor]]


class PatchDiT(ModelMixin, ConfigMixin):
    """x̂₀ = f_θ(x_t, y₀, t, prompt): predicts the clean patch, as a linear estimate plus what the network adds.

    The linear estimate is y₀ + m g_t (x_t − √ᾱ_t y₀). g_t is the gain of the Wiener filter for a residual x₀ − y₀ of
    known variance (`set_filter`); the network says by m, in (0, 2), where there is less of it, as in a sky, and where
    more. Without this a small network spends its width on letting x_t through at small t, and leaves grain.

    What is added is scaled by σ_t / √(σ_t² + ρ²), where σ_t = √(1 − ᾱ_t) / √ᾱ_t is the noise of x_t over its signal and
    ρ the deviation of what can be predicted of x₀ − y₀ (c_out of Karras et al. 2022, for data of deviation ρ). So
    where the noise is weaker than what was predicted before, that is kept, and a start at a small T changes little: the
    result tends to y₀.

    x_t and y₀ are concatenated along the channels (Figure 4 feeds the pair); t enters by adaLN with one map
    shared by all blocks and a table per block; every block attends to the texture prompt, and the time
    embedding scales each dimension of that attention's result, so that the prompt itself does not depend on
    t and is encoded once per patch (Section 3.3). Patches never see each other.

    Args:
        channels: c of the latents.
        size: V, side of a patch in latent cells.
        patch: side of a token in latent cells.
        width, depth, heads: D, number of blocks, attention heads.
        prompt_width: width of the prompt's tokens.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        size: int = 16,
        patch: int = 2,
        width: int = 192,
        depth: int = 8,
        heads: int = 3,
        prompt_width: int = 192,
    ):
        super().__init__()
        self.embed = nn.Linear(2 * channels * patch**2, width)
        positions = get_2d_sincos_pos_embed(width, size // patch, output_type="pt")
        self.register_buffer("positions", positions.float(), persistent=False)
        self.time = TimestepEmbedding(width, width)
        self.modulation = nn.Linear(width, 7 * width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, prompt_width) for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, 2 * channels * patch**2)  # what is added, and m
        self.null_prompt = nn.Parameter(torch.zeros(1, 1, prompt_width))
        self.register_buffer("gain", torch.zeros(TIMESTEPS, channels))  # g_t of each channel, for t = 1…1000
        self.register_buffer("signal", torch.zeros(TIMESTEPS))  # √ᾱ_t
        self._zero_init()

    def _zero_init(self) -> None:
        """adaLN-zero: every block starts as the identity, the network as the linear estimate (y₀ before
        `set_filter`)."""
        for layer in (self.modulation, self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in self.blocks:
            nn.init.zeros_(block.cross_out.weight)
            nn.init.zeros_(block.cross_out.bias)

    def set_filter(self, alphas: Tensor, variance: Tensor) -> None:
        """Set g_t = √ᾱ v / (ᾱ v + 1 − ᾱ), the gain of least squared error where x₀ − y₀ has variance v.

        Args:
            alphas: ᾱ_t for t = 1…1000, in (0, 1).
            variance: v, c numbers, the mean of (x₀ − y₀)² in each channel.
        """
        self.signal.copy_(alphas.sqrt())
        power = alphas.sqrt()[:, None] * variance  # T×c
        self.gain.copy_(power / (alphas[:, None] * variance + 1 - alphas[:, None]))

    def prompt_keys(self, prompt: Tensor | None) -> PromptKeys:
        """Keys and values of all blocks for a prompt N×L×prompt_width: what every step shares, ready to multiply.

        None stands for "no prompt" and gives those of one learned token, which broadcasts over N.
        """
        prompt = (self.null_prompt if prompt is None else prompt).to(self.dtype)
        return [block.prompt_keys(prompt) for block in self.blocks]

    def forward(self, x_t: Tensor, y0: Tensor, t: Tensor, prompt: Tensor | PromptKeys | None = None) -> Tensor:
        """Predict the clean patches.

        Args:
            x_t: noisy patches, N×c×V×V.
            y0: coarse patches, N×c×V×V.
            t: times, N integers in 1…1000, or one for all.
            prompt: tokens N×L×prompt_width, or their `prompt_keys`, or None for no prompt.

        Returns:
            x̂₀, N×c×V×V.
        """
        size, patch, width = self.config.size, self.config.patch, self.config.width
        keys = prompt if isinstance(prompt, list) else self.prompt_keys(prompt)
        pair = torch.cat([x_t, y0], dim=1).to(self.dtype)  # N×2c×V×V
        tokens = F.pixel_unshuffle(pair, patch).flatten(2).transpose(1, 2)  # N×L'×2c·p²
        x = self.embed(tokens) + self.positions.to(self.dtype)  # N×L'×D
        time = self.time(get_timestep_embedding(t, width, flip_sin_to_cos=True).to(self.dtype))  # N×D
        time = F.silu(time)
        modulation = self.modulation(time).unflatten(1, (7, width))  # N×7×D
        for block, pair_of_keys in zip(self.blocks, keys, strict=True):
            x = block(x, modulation, pair_of_keys)  # N×L'×D
        shift, scale = self.final_modulation(time).unsqueeze(1).chunk(2, dim=-1)  # N×1×D
        x = self.final(modulate(x, shift, scale))  # N×L'×2c·p²
        side = size // patch
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), patch)  # N×2c×V×V
        # In one order of memory, or the sigmoid of a single patch would differ in its last bit from that of many.
        added, trust = x.contiguous().to(y0.dtype).chunk(2, dim=1)  # N×c×V×V each
        gain, signal = self.gain[t - 1][..., None, None], self.signal[t - 1].view(-1, 1, 1, 1)  # N×c×1×1, N×1×1×1
        noise = 1 - signal.square()
        scale = (noise / (noise + PREDICTABLE**2 * signal.square())).sqrt()
        return y0 + 2 * trust.sigmoid() * gain * (x_t - signal * y0) + scale * added


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, MLP: N×L'×D → N×L'×D."""

    def __init__(self, width: int, heads: int, prompt_width: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(7, width) / width**0.5 * 0.1)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.cross_query = nn.Linear(width, width)
        self.cross_keys = nn.Linear(prompt_width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def prompt_keys(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """N×L×prompt_width → keys and values, each N×heads×L×D/heads."""
        keys, values = self._split(self.cross_keys(prompt), 2)
        return keys, values

    def forward(self, x: Tensor, modulation: Tensor, prompt: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate, cross_scale, mlp_shift, mlp_scale, mlp_gate = (
            (self.table + modulation).unsqueeze(2).unbind(1)
        )  # each N×1×D
        query, key, value = self._split(self.qkv(modulate(x, shift, scale)), 3)  # each N×heads×L'×D/heads
        x = torch.addcmul(x, gate, self.out(self._attend(query, key, value)))
        (query,) = self._split(self.cross_query(x), 1)
        keys, values = (part.expand(x.shape[0], -1, -1, -1) for part in prompt)
        seen = self.cross_out(self._attend(query, keys, values))
        x = torch.addcmul(x, 1 + cross_scale, seen)  # the dimension-wise scaling from the time embedding
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(x, mlp_shift, mlp_scale)))

    def _split(self, x: Tensor, count: int) -> Tensor:
        """N×L×(count D) → count×N×heads×L×D/heads, in one copy."""
        return x.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4).contiguous()

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device.type == "cpu":
            # With 64 tokens plain products are faster than torch's flash attention for CPUs: they take .56 of a
            # training step, and .61 of the attention in sampling.
            heads = query.shape[1]
            query, key, value = (part.flatten(0, 1) for part in (query, key, value))  # each N·heads×L×D/heads
            none = query.new_zeros(1, 1, 1)
            scores = torch.baddbmm(none, query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5)
            seen = (scores.softmax(-1).to(value.dtype) @ value).unflatten(0, (-1, heads))
        else:
            seen = F.scaled_dot_product_attention(query, key, value)
        return seen.transpose(1, 2).flatten(2)  # N×L'×D


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer_norm(x) (1 + scale) + shift for x N×L'×D, in one pass where all patches share the time (1×1×D)."""
    width = x.shape[-1:]
    if len(scale) == 1:  # under autocast x may be wider than what the products gave, which this one pass does not take
        return F.layer_norm(x, width, (1 + scale[0, 0]).to(x.dtype), shift[0, 0].to(x.dtype))
    return F.layer_norm(x, width) * (1 + scale) + shift
