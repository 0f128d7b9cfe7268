"""How well latents tell concepts apart, beside probes and baselines."""
