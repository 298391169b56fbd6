"""One token at a time: latents in, tokens out."""
