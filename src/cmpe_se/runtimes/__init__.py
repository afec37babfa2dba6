"""Running and timing networks: engines, timing in turns, exported files."""
