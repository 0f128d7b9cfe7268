"""Everything that fits something to data."""
