"""Similarity-aware texture encoder: retrieved priors → the texture prompt (Section 3.3)."""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F


class TextureEncoder(ModelMixin, ConfigMixin):
    """Top-K priors and their similarities → prompt tokens, once per patch and not once per step.

    Each prior is brought to the mean and deviation that the query patch has in each channel, so that it
    carries texture and not colour. Its tokens are scaled by its similarity, and one transformer layer lets
    the tokens of all priors see each other.

    Args:
        channels, size: c and V of the priors.
        patch: side of a token in latent cells; a prior gives (V / patch)² tokens.
        width: D, width of the tokens.
        heads: attention heads.
        top_k: K, the number of priors to retrieve.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        size: int = 16,
        patch: int = 4,
        width: int = 192,
        heads: int = 4,
        top_k: int = 4,
    ):
        super().__init__()
        self.embed = nn.Linear(channels * patch**2, width)
        positions = get_2d_sincos_pos_embed(width, size // patch, output_type="pt")
        self.register_buffer("positions", positions.float(), persistent=False)
        self.similarity = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, priors: Tensor, similarities: Tensor, query: Tensor) -> Tensor:
        """Encode the priors.

        Args:
            priors: tp^k of Algorithm 1, N×K×c×V×V.
            similarities: s^k, N×K in [-1, 1].
            query: the coarse patches y₀ that they were retrieved for, N×c×V×V.

        Returns:
            The prompt, N×L×D with L = K (V / patch)².
        """
        priors = match_statistics(priors, query).to(self.dtype)  # N×K×c×V×V
        tokens = F.pixel_unshuffle(priors, self.config.patch).flatten(3).transpose(2, 3)  # N×K×L'×c·p²
        score = similarities.to(self.dtype)[..., None, None]  # N×K×1×1
        x = (self.embed(tokens) + self.positions.to(self.dtype)) * score  # N×K×L'×D
        x = (x + self.similarity(score)).flatten(1, 2)  # N×L×D
        return self.norm(self.layer(x))  # N×L×D


def match_statistics(priors: Tensor, query: Tensor) -> Tensor:
    """Give priors N×K×c×V×V the per-channel mean and deviation of their query N×c×V×V."""
    query = query[:, None].float()
    mean, std = priors.float().mean((-2, -1), keepdim=True), priors.float().std((-2, -1), keepdim=True)
    wanted = query.std((-2, -1), keepdim=True)
    return (priors - mean) / (std + 1e-3) * wanted + query.mean((-2, -1), keepdim=True)
