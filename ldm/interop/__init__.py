"""Models of other projects: their files become our modules, and ours become their files."""
