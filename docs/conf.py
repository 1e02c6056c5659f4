"""Sphinx configuration: pages in MyST Markdown, executed where they hold code cells, without the network."""

import re

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
nb_merge_streams = True  # what a cell prints is one block

# Docstrings are in numpydoc's sections, types are read from the annotations.
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

# pytest runs the examples in docstrings; here only the `{doctest}` and `{testcode}` blocks of the pages run.
doctest_test_doctest_blocks = ""


# Docstrings are plain text with `code` in single backticks; nothing else in them is markup.
default_role = "code"
ARGUMENT = re.compile(r"^(\s*)([a-z_]\w*(?:, [a-z_]\w*)*) : (.*)$")


def plain(line):
    """Escape what reStructuredText would take for markup, outside of backticks."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = line.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", parts[number])
        if number and re.match(r"\w", parts[number]):
            parts[number] = "\\ " + parts[number]
    return "`".join(parts)


def setup(app):
    """Turn the lines `name : meaning` of a docstring into a field list."""

    def arguments(app, what, name, obj, options, lines):
        made = []
        inside = False
        for line in map(plain, lines):
            found = ARGUMENT.match(line)
            if found and not line.lstrip().startswith(">>>"):
                if not inside and made and made[-1].strip():
                    made.append("")
                indent, names, meaning = found.groups()
                made.append(f"{indent}:{names}: {meaning}")
                inside = True
            else:
                inside = inside and bool(line.strip()) and line.startswith(" ")
                if made and made[-1].lstrip().startswith(":") and line.strip() and not line.startswith(" "):
                    made.append("")
                made.append(line)
        lines[:] = made

    app.connect("autodoc-process-docstring", arguments)
