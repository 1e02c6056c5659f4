"""What pages with commands run first: a folder of their own, and `%%bash` cells whose output comes in one piece."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from IPython.core.magic import register_cell_magic

# `fnreg` as a command is beside this Python, on the path or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.chdir(tempfile.mkdtemp())


@register_cell_magic
def bash(line, cell):
    """The output of a cell of bash; an error where it fails."""
    done = subprocess.run(["bash", "-ec", cell], capture_output=True, text=True)
    print(done.stdout + done.stderr, end="")
    done.check_returncode()
