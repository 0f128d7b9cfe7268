"""See `latents.vector_saes`."""

from __future__ import annotations

from ..latents.vector_saes import constant_sae as constant_sae
from ..latents.vector_saes import direction_sae as direction_sae
