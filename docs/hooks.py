"""Pages of the site that are files of the repository, links that lead out of it, and formulas."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"research-log.md": "research/RESEARCH.md", "every-point.md": "research/study.md"}

# What the research log says, before it goes into detail.
FIRST = """# Research log

In ten lines:

1. Second-order steps of the ancestral chain are the strongest solver for nearly every network on digits and letters.
2. On emoji, without guidance, DPM-Solver++ is the strongest at few steps.
3. At equal ancestral steps a pair comes about as low as its heavy network, for 1.4 to 3.1 times fewer FLOPs.
4. Late contexts on letters: the one undistilled pair ahead of rivals of equal training FLOPs, at 39, 42 and 59 MFLOP.
5. A plain U-Net of the heavy network's cost is better than the heavy network on letters and emoji.
6. A small network that is given the heavy network's training FLOPs is better than every pair on digits and emoji.
7. Students of pairs equal or beat single-rate students on digits, letters and emoji from prompts, and lose to one on `emoji32`.
8. A trained network becomes a pair for a part of its cost; that pair does well where two steps share a context.
9. Contexts that are always fresh in training fail where steps share them in sampling.
10. Fewer FLOPs become less time only where the networks fill the device.

"""


def read_page(source: str) -> str:
    """A file of the repository as a page: its links within the repository become plain text, other links stay."""
    text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", text)
    return FIRST + re.sub(r"^# ", "## In detail: ", text) if source.endswith("RESEARCH.md") else text


def on_files(files, config):
    for page, source in PAGES.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, content=read_page(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to those files, which hold in a clone, lead to their pages."""
    for made, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({made}")
    return markdown


def on_page_content(page_html, page, config, files):
    """Formulas as MathML, which browsers draw themselves: no script of others is loaded."""
    for left, right, display in ((r"\\\(", r"\\\)", "inline"), (r"\\\[", r"\\\]", "block")):
        formula = rf'class="arithmatex">{left}(.*?){right}'
        page_html = re.sub(
            formula,
            lambda found, display=display: 'class="arithmatex">' + convert(html.unescape(found[1]), display=display),
            page_html,
            flags=re.DOTALL,
        )
    return page_html
