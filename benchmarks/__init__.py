"""Speed, memory and accuracy of fnreg against peers: `python -m benchmarks`, see README.md beside this file."""
