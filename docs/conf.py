"""Sphinx configuration: pages in MyST Markdown, executed where they hold code cells, without the network."""

import fnreg

project = "fnreg"
author = "The fnreg authors"
copyright = author
release = version = fnreg.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "fnreg"

# A page with `{code-cell}` blocks runs whole on every build, and a cell that raises fails the build.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

# Docstrings are in numpydoc's sections, types are read from the annotations.
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

# pytest runs the examples in docstrings; here only the `{doctest}` and `{testcode}` blocks of the pages run.
doctest_test_doctest_blocks = ""
