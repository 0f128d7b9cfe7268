"""Features and strengths that steer: found, chosen, compared."""
