"""What is only there for CPUs."""
