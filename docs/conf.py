"""The documentation site. ``make docs`` builds it to docs/_build/html, without network."""

import importlib
import inspect
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import sklearn_relish

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/sklearn-relish/sklearn-relish"

# The examples write pictures and states into their folder, so the gallery runs copies of them.
EXAMPLES = ROOT / "docs" / "_build" / "examples"
EXAMPLES.mkdir(parents=True, exist_ok=True)
for stale in {path.name for path in EXAMPLES.glob("*.py")} - {
    path.name for path in (ROOT / "examples").glob("*.py")
}:
    (EXAMPLES / stale).unlink()
for path in [*(ROOT / "examples").glob("*.py"), ROOT / "docs" / "GALLERY_HEADER.rst"]:
    copy = EXAMPLES / path.name
    if not copy.exists() or copy.read_bytes() != path.read_bytes():
        shutil.copyfile(path, copy)

# The examples that the gallery runs: all except services, which do not end by themselves.
EXECUTED = r"(?<!\w)(?!serve_)\w+\.py$"

project = "sklearn-relish"
author = copyright = "the sklearn-relish developers"
version = release = sklearn_relish.__version__
language = "en"

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "GALLERY_HEADER.rst", "**/*.ipynb", "gallery/**/*.py*"]
templates_path = ["_templates"]
default_role = "literal"

myst_heading_anchors = 4
suppress_warnings = ["config.cache"]  # the gallery's configuration can't be pickled

add_module_names = False
toc_object_entries_show_parents = "hide"
autodoc_typehints = "none"  # numpydoc sections have the types
autosummary_generate = True
numpydoc_show_class_members = False


def own_members(module: str, name: str, members: list[str]) -> list[str]:
    """The members of a class that this package defines and documents, in the order of the class."""
    cls = getattr(importlib.import_module(module), name)
    own = [base for base in cls.__mro__ if base.__module__.startswith("sklearn_relish")]
    return [
        member
        for member in dict.fromkeys(member for base in own for member in vars(base))
        if member in members
        and not member.startswith("_")
        and not member.endswith("_request")  # scikit-learn's
        and inspect.getattr_static(cls, member).__doc__
        and type(inspect.getattr_static(cls, member)).__name__ != "_tuplegetter"
    ]


autosummary_context = {"own_members": own_members}

sphinx_gallery_conf = {
    "examples_dirs": str(EXAMPLES),
    "gallery_dirs": "gallery",
    "filename_pattern": os.environ.get("GALLERY") or EXECUTED,
    "example_extensions": {".py"},
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),  # only what is printed; the parameters of a regressor contain local paths
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
}

html_theme = "pydata_sphinx_theme"
html_title = "sklearn-relish"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "icon_links": [{"name": "GitHub", "url": REPOSITORY, "icon": "fa-brands fa-github"}],
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "whats_new": [], "lab_book": []}

NAME = re.compile(rf"({'|'.join(sklearn_relish.__all__)})(\.\w+)?")


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Let names of the package link to the API reference, in pages that GitHub shows too."""
    if not app.env.docname.startswith("guide/"):
        return
    for literal in list(doctree.findall(nodes.literal)):
        if NAME.fullmatch(literal.astext()) and not isinstance(literal.parent, nodes.reference):
            reference = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"sklearn_relish.{literal.astext()}",
                refexplicit=True,
                refwarn=True,
            )
            literal.replace_self(reference)
            reference += literal


FILES = [  # what the guide links to in the repository, and its pages on the site
    (re.compile(r"\]\(\.\./\.\./benchmarks/README\.md#"), "](../lab_book.md#"),
    (re.compile(r"\]\(\.\./\.\./examples/(\w+)\.py\)"), r"](../gallery/\1.rst)"),
]


def link_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links to files of the repository lead to pages of the site."""
    if name.startswith("guide/"):
        for file, page in FILES:
            source[0] = file.sub(page, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_pages)
    app.connect("doctree-read", link_names)
