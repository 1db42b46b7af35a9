"""What is measured, and by which command: benchmarks/README.md."""
