"""Speed, memory and accuracy of fnreg against peers: `python -m benchmarks`, see README.md beside this file."""

from fnreg.process import prepare

prepare()  # before torch loads, as the command line of fnreg does
