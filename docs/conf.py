"""Sphinx's settings for `make docs`: a site of the same Markdown that a forge shows.

The source is the root of the repository: a link between two files leads to the same page in both.
"""

import re
from pathlib import Path

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import gradstat

project = "gradstat"
author = "The gradstat authors"
copyright = author
version = release = gradstat.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"),
    *("bench/README.md", "bench/results/**.md", "tests/cuda_device/README.md"),
]
# Folders that need not be searched for pages.
exclude_patterns = [".*", "build", "dist", "study", "gradstat", "kernels", "examples"]
# The pages in the margin, by caption, below the page that has them there.
CONTENTS = {
    "README": {
        "What do you see?": [
            *("docs/loss-is-nan", "docs/loss-spiked", "docs/it-does-not-learn"),
            *("docs/narrow-types", "docs/coming-from", "docs/many-gpus", "docs/what-it-costs"),
        ],
        "Guides": ["docs/training", "docs/reading", "docs/viewers", "docs/formats", "docs/study"],
        "Look it up": ["docs/reference", "docs/statistics", "docs/format", "docs/kernels"],
        "Project": ["bench/README", "CONTRIBUTING", "CHANGELOG"],
    },
    "bench/README": {"Results": ["bench/results/*", "bench/results/xeon/*"]},
    "CONTRIBUTING": {"Tests": ["tests/cuda_device/README"]},
}

# Links to a heading, as a forge makes them.
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]

# A docstring has names between single backticks: links where they are documented. Those that are
# not, of other libraries and single words, stay code; one of ours that is gone is an error.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", ".*"),
    ("py:obj", r"[a-z_]+|[A-Z_]+|(torch|numpy)\..*|gradstat\.[a-z_.]+"),
]
# A site of the reference needs no trainers and no viewers.
autodoc_mock_imports = [
    *("lightning", "transformers"),
    *("tensorboard", "torch.utils.tensorboard", "wandb"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "gradstat"
html_show_sourcelink = False
html_copy_source = False
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img alt="([^"]*)" src="([^"]+)">\s*</picture>'
)


def setup(app: Sphinx) -> None:
    app.connect("source-read", prepare)
    # Before Napoleon's, whose priority is 500.
    app.connect("autodoc-process-docstring", keep_colon, priority=400)
    app.connect("missing-reference", find_in_gradstat)
    app.connect("build-finished", open_at_readme)


def prepare(app: Sphinx, name: str, source: list[str]) -> None:
    """A picture for light and one for dark become what the theme switches; contents."""
    source[0] = PICTURE.sub(
        r'<img alt="\2" src="\3" class="only-light">\n<img alt="\2" src="\1" class="only-dark">',
        source[0],
    )
    for caption, pages in CONTENTS.get(name, {}).items():
        listed = "\n".join(f"/{page}" for page in pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def keep_colon(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Napoleon takes what is before a colon in a property's first line for its type."""
    if what == "property":
        lines.insert(0, "")


def find_in_gradstat(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: Element
) -> Element | None:
    """`History` is gradstat's in a docstring of gradstat.plot too."""
    if node["refdomain"] != "py":
        return None
    name = f"gradstat.{node['reftarget']}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, shown)


def open_at_readme(app: Sphinx, error: Exception | None) -> None:
    """A folder opens at its index."""
    if error is None:
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)
