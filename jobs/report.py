"""What a job says about itself: the report, its summary for people, and progress while it runs.

Reports go to stdout, everything else to stderr. The numbers must add up: a report that does not account for every
document that was read is a fault of ours, and raises.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

BAD_ENDS = {"failed": 1, "refused": 2, "unpublished": 3}
"""{status of a report that does not mean success: exit status of its command}, the worst first."""


@dataclass(frozen=True, slots=True)
class EmbedReport:
    """What `nightloom embed` did."""

    job: str
    status: str
    """published: readers see a new version; unchanged: nothing was to do; partial: a limit ended the run before all was
    done; unpublished: the reason is on stderr."""
    table: str
    version: int
    fingerprint: str
    read: int
    embedded: int
    unchanged: int
    empty: int
    duplicate: int
    dead: int
    deleted: int
    chunks: int
    """Vectors written."""
    tokens: int
    """Tokens that the encoder saw, special ones included."""
    truncated_tokens: int
    padding: float
    """Share of what the encoder computed that was padding."""
    seconds: float
    tokens_per_s: float
    left: int = 0
    """Documents that the run did not come to."""
    reused: int = 0
    """Vectors of unchanged chunks of changed documents: written, and not encoded."""
    published: int | None = None
    """The version that readers see."""
    wasted_tokens: int = 0
    """Tokens that were encoded for nothing: with workers and machines that were lost, or when a limit ended the run."""

    def __post_init__(self) -> None:
        accounted = self.embedded + self.unchanged + self.empty + self.duplicate + self.dead + self.left
        if accounted != self.read:
            raise RuntimeError(f"{self.read} documents were read, {accounted} are accounted for: {asdict(self)}")

    def summary(self) -> str:
        """A few lines that say what matters first."""
        if self.status == "unchanged":
            head = f"Nothing to embed: all {self.unchanged:,} documents stand in {self.table} as they are."
            if self.unchanged != self.read:
                head = f"Nothing to embed: {self.table} is up to date."
        else:
            head = f"{self.embedded:,} documents embedded into {self.table}"
            head += f", published as version {self.version}." if self.published == self.version else "; not published."
        others = ("left", "unchanged", "empty", "duplicate", "dead", "deleted")
        lines = [head, "", line("read", f"{self.read:,} documents")]
        lines += [line(name, f"{value:,}") for name in others if (value := getattr(self, name))]
        if self.embedded:
            again = f", {self.reused:,} of them as they were" if self.reused else ""
            lines.append(line("vectors", f"{self.chunks:,}{again}"))
            lines.append(
                line("tokens", f"{self.tokens:,} at {self.tokens_per_s:,.0f} a second, {self.padding:.1%} padding")
            )
        if self.wasted_tokens:
            share = self.wasted_tokens / (self.tokens + self.wasted_tokens)
            lines.append(line("wasted", f"{self.wasted_tokens:,} tokens, {share:.1%}: lost with workers, or cut off"))
        if self.truncated_tokens:
            lines.append(
                line("truncated", f"{self.truncated_tokens:,} tokens were cut off; see chunking.long_documents")
            )
        lines.append(line("time", clock(self.seconds)))
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def line(name: str, value: str) -> str:
    return f"  {name:<11}{value}"


def clock(seconds: float) -> str:
    """7.3 -> "7.3 s", 754 -> "12 min 34 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


class Progress:
    """Documents, tokens a second and time left, on stderr: a bar in a terminal, now and then a line elsewhere."""

    EVERY_S = 30.0
    """Seconds between lines where stderr is not a terminal."""

    def __init__(self, total_documents: int, total_chars: int, doing: str = "embedding") -> None:
        self.total_documents, self.total_chars = total_documents, max(total_chars, 1)
        self.documents = self.tokens = self.chars_done = 0
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        self.task: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn(doing),
                BarColumn(),
                TextColumn("{task.fields[documents]}"),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(doing, total=self.total_chars, documents="starting", speed="")

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, documents: int, tokens: int, chars: int) -> None:
        """Say that so many more are done. Time left goes by characters: documents are too uneven."""
        self.documents += documents
        self.tokens += tokens
        self.chars_done += chars
        done = min(self.chars_done / self.total_chars, 1.0)
        elapsed = time.monotonic() - self.started
        speed = f"{self.tokens / max(elapsed, 1e-9):,.0f} tokens/s"
        count = f"{self.documents:,} of {self.total_documents:,} documents"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.chars_done, documents=count, speed=speed)
        elif time.monotonic() - self.last_line >= self.EVERY_S:
            self.last_line = time.monotonic()
            left = clock(elapsed * (1 - done) / max(done, 1e-9))
            print(f"nightloom: {count}, {speed}, about {left} left", file=sys.stderr, flush=True)


REPORT_KEYS = tuple(f.name for f in fields(EmbedReport))
