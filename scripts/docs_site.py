"""What `mkdocs.yml` hooks into the build of the site.

A notebook becomes a page as it was saved, with the outputs that are stored in it: nothing is run
here. In tables a number and its interval stay on one line, and a picture leads to its full size.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# "≥ 1.51 [1.45, 1.57]", of which sign and interval may be missing.
_NUMBER = re.compile(r"[≤≥≲] [+-]?[\d.]+x?(?: \[[^\]|]*\])?|[+-]?[\d.]+x? \[[^\]|]*\]")
_PICTURE = re.compile(r"(?m)^(!\[[^\]]*\]\((pictures/[^)]*\.png)\))$")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a page of Markdown in the place of every notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            name = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, name, content=notebook_page(file.content_string)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep numbers in tables beside their intervals; link pictures, and notebooks' pages."""
    lines = markdown.split("\n")
    for idx, line in enumerate(lines):
        if line.startswith("|"):
            lines[idx] = _NUMBER.sub(lambda found: found[0].replace(" ", "\u00a0"), line)
    text = "\n".join(lines).replace(".ipynb)", ".md)")
    return _PICTURE.sub(r"[\1](\2)", text)


def notebook_page(notebook: str) -> str:
    """Return the cells and stored outputs of a notebook, JSON of nbformat 4, as Markdown."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(_block(source, "python"))
            streams, others = [], []
            for output in cell["outputs"]:
                is_stream = output["output_type"] == "stream"
                (streams if is_stream else others).append(output)
            if streams:
                text = "".join(part for output in streams for part in output["text"])
                parts.append(_block(text, "text"))
            parts += [_output(output) for output in others]
    return "\n\n".join(parts) + "\n"


def _block(text: str, language: str) -> str:
    # A fence of four marks may hold one of three.
    return f"````{language}\n{text.rstrip()}\n````"


def _output(output: dict[str, Any]) -> str:
    """Return the richest form of an output that a page can show."""
    if output["output_type"] == "error":
        raise ValueError(f"the notebook was saved with an error: {output['evalue']}")
    data = output["data"]
    if "text/html" in data:
        # Markdown takes HTML up to the first empty line.
        lines = "".join(data["text/html"]).splitlines()
        return "<div>\n" + "\n".join(line for line in lines if line.strip()) + "\n</div>"
    if "image/svg+xml" in data:
        lines = "".join(data["image/svg+xml"]).splitlines()
        return "<div>\n" + "\n".join(line for line in lines if line.strip()) + "\n</div>"
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f"![output of the cell above](data:image/png;base64,{image})"
    return _block("".join(data["text/plain"]), "text")
