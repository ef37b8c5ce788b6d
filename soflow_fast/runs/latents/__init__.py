"""Making latents: by a VAE, on one or more devices, of another format, of the digits."""
