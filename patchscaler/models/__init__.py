"""The networks of the paper's Figure 2, each a diffusers `ModelMixin` with its own config."""

from .autoencoder import CompactAutoencoder, decode_latents, encode_latents
from .grm import GRM, GRMOutput
from .patch_dit import PatchDiT
from .texture_classifier import TextureClassifier
from .texture_encoder import TextureEncoder
from .texture_memory import TextureMemory

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
]
