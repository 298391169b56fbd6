"""The whole prompt at once: tokens in, latents and a first token out."""
