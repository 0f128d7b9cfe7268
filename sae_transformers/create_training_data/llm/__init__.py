"""Language models that are asked: at a server, in a batch, or run here."""
