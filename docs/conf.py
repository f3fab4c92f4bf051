"""The site: `make docs` writes it to build/docs, without a warning and without anything from the web."""

project = "Stageline"
author = "the Stageline authors"
copyright = author
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Stageline"
html_copy_source = False
html_show_sphinx = False
nitpicky = True
