"""Sphinx: `make docs`. Nothing is fetched; the theme has its own styles, fonts are the system's."""

import importlib.metadata

project = "Espalier"
author = "the Espalier authors"
version = release = importlib.metadata.version("espalier")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
default_role = "code"
nitpick_ignore_regex = [("py:.*", r".*")]  # types of other packages have no pages here

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Links to files of the repository, which have no page.
myst_url_schemes = ("http", "https", "mailto")
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_mock_imports: list[str] = []

smartquotes = False
html_theme = "furo"
html_title = f"Espalier {version}"
html_show_sourcelink = False
