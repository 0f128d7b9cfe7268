"""How far steering to a topic can be trusted, and what it writes."""
