"""What `mteb` and the evaluators of sentence-transformers ask of a model beside `encode`, without importing either.

`Embedder` inherits it, so that `mteb.evaluate(embedder, tasks)` and `InformationRetrievalEvaluator(...)(embedder)` run
as they are. Both pass options that decide nothing here, such as a batch size: those are taken and left.
Shape suffixes: N and M vectors, D width.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError

QUERY_PROMPTS = ("query", "search_query", "question")
"""Names under which model folders keep the prompt for questions; the first that there is counts."""
DOCUMENT_PROMPTS = ("document", "passage", "search_document", "corpus")
LEFT = frozenset(
    {
        *("batch_size", "show_progress_bar", "convert_to_numpy", "device", "chunk_size", "num_workers"),
        *("task_metadata", "hf_split", "hf_subset"),
    }
)
"""Options of theirs that decide no vector."""

Vectors = np.ndarray | Tensor


class ModelCard:
    """Where sentence-transformers' evaluators leave their figures; they return them too."""

    def set_evaluation_metrics(self, *_: Any) -> None:
        """Nothing to do: a model folder is not changed by being looked at."""


class Protocols:
    """The questions of other libraries; `prompts` and `encode` are the embedder's."""

    prompts: dict[str, str]
    encode: Any
    similarity_fn_name: str = "cosine"
    mteb_model_meta = None
    """mteb then records an unnamed model; an evaluation that is kept has the hash of the weights instead."""
    model_card_data = ModelCard()

    def eval(self) -> "Protocols":
        """An embedder never trains."""
        return self

    def encode_query(self, texts: Sequence[str] | str, **options: Any) -> Any:
        """`encode` with the folder's prompt for questions, where it has one."""
        return self.encode(texts, **(options | self.prompt_option(QUERY_PROMPTS, options)))

    def encode_document(self, texts: Sequence[str] | str, **options: Any) -> Any:
        """`encode` with the folder's prompt for documents, where it has one."""
        return self.encode(texts, **(options | self.prompt_option(DOCUMENT_PROMPTS, options)))

    def prompt_option(self, names: Sequence[str], options: Mapping[str, Any]) -> dict[str, str]:
        """The first of these prompts that the folder defines, unless the options name one."""
        named = options.get("prompt") is not None or options.get("prompt_name") is not None
        known = [name for name in names if name in self.prompts]
        return {"prompt_name": known[0]} if known and not named else {}

    def similarity(self, first: Vectors, second: Vectors) -> Tensor:
        """Cosines of all pairs, (N, M); dot products where the folder says so.

        Raises:
            InputError: the folder wants another measure.
        """
        return self._compared(first) @ self._compared(second).T

    def similarity_pairwise(self, first: Vectors, second: Vectors) -> Tensor:
        """The same of pairs, (N,)."""
        return (self._compared(first) * self._compared(second)).sum(dim=-1)

    def _compared(self, vectors: Vectors) -> Tensor:
        """(N, D) float32, whose products are the similarities; a single vector is one row."""
        rows_ND = torch.atleast_2d(torch.as_tensor(vectors)).float()
        if self.similarity_fn_name == "dot":
            return rows_ND
        if self.similarity_fn_name == "cosine":
            return torch.nn.functional.normalize(rows_ND, dim=-1)
        raise InputError(f"the model's similarity is {self.similarity_fn_name!r}; computed here are cosine and dot")


def check_left(options: Mapping[str, Any]) -> None:
    """Refuse an option that nobody knows, or that asks for vectors of another kind.

    Raises:
        TypeError: there is one.
    """
    for name, value in options.items():
        as_it_is = (name, value) in (("precision", "float32"), ("output_value", "sentence_embedding"))
        if name not in LEFT and not as_it_is and value is not None:
            raise TypeError(f"encode() has no option {name}={value!r}")


def texts_of(inputs: Sequence[str] | Iterable[Mapping[str, Sequence[str]]]) -> list[str]:
    """Texts as they are, or out of what mteb passes: batches with a column "text"."""
    found: list[str] = []
    for item in inputs:
        if isinstance(item, str):
            found.append(item)
        else:
            found += item["text"]
    return found


def prompt_names(prompt_type: Any) -> Sequence[str]:
    """The names for one of mteb's prompt types, "query" or "document"; none for None."""
    kind = getattr(prompt_type, "value", prompt_type)
    return {"query": QUERY_PROMPTS, "document": DOCUMENT_PROMPTS}.get(kind, ())
