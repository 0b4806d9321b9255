"""The command line: composes a config with Hydra and runs what it describes."""
