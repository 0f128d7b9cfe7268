"""See `latents.diffmean`."""

from __future__ import annotations

from ..latents.diffmean import fit_diffmean as fit_diffmean
