from .cli import app

app(prog_name="python -m sae_transformers")
