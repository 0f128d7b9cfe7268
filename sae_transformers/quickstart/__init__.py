"""The quickstart: train an SAE with a sentiment latent, detect, steer, save and load again. Imports every room."""
