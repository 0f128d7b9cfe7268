"""Features and strengths that steer, found and calibrated."""
