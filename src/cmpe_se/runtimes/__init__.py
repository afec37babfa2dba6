"""What a network runs on, and how long it takes: engines, timing in turns, exported files."""
