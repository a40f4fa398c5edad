"""What an operator sets: flags, environment and TOML from one dataclass each."""
