"""The networks of the paper's Figure 2, each a diffusers `ModelMixin` with its own config."""

from patchscaler.models.autoencoder import CompactAutoencoder, decode_latents, encode_latents, load_autoencoder
from patchscaler.models.grm import GRM, GRMOutput
from patchscaler.models.patch_dit import PatchDiT
from patchscaler.models.texture_classifier import TextureClassifier
from patchscaler.models.texture_encoder import TextureEncoder
from patchscaler.models.texture_memory import TextureMemory

__all__ = [
    "GRM",
    "CompactAutoencoder",
    "GRMOutput",
    "PatchDiT",
    "TextureClassifier",
    "TextureEncoder",
    "TextureMemory",
    "decode_latents",
    "encode_latents",
    "load_autoencoder",
]
