"""Texts as people have them -> tokens -> hidden states -> latents: what every measurement reads with."""
