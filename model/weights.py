"""Weights in and out of Hugging Face and sentence-transformers folders: safetensors only, key for key.

Parameter names are Hugging Face's already; all that differs is the `model.` prefix of a folder that was saved with a
head.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.attention import choose_backend
from model.config import EncoderConfig
from model.decoder import CausalLanguageModel, Decoder
from model.dense import Dense, load_dense, save_dense
from model.encoder import Encoder
from model.errors import InputError
from model.folder import INT8, INT8_FILE, POOLING_NAMES, SINGLE, DenseLayer, ModelFolder, read_json, write_json
from model.heads import HEADS, Headed, MaskedLanguageModel
from model.quantized import QuantizedEmbedding, quantize

ARCHITECTURES = {"ModernBertDecoderForCausalLM": CausalLanguageModel, **HEADS}
"""What is read and written, by Hugging Face's names; None is the bare encoder."""
PREFIX = "model."
EMBEDDING = "model.embeddings.tok_embeddings.weight"


def load_encoder(folder: ModelFolder, **options: Any) -> Encoder:
    """The encoder of a folder, whatever head was saved with it.

    Args:
        folder: as `read_folder` gave it.
        options: for `Encoder` (`attention`, `dtype`, `device`).

    Raises:
        InputError: weights that are unreadable, missing, or of another shape than config.json says.
    """
    state = _read_state(folder)
    if any(key.startswith(PREFIX) for key in state):
        state = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if folder.int8:
        options.setdefault("dtype", torch.float32)  # of what is computed; the weights' own says nothing
    encoder = _on_meta(folder.config, options)
    if folder.int8:
        quantize(encoder)
    _assign(encoder, state, folder, strict_names=False)
    return encoder


def load_model(
    folder: ModelFolder, architecture: str | None = None, **options: Any
) -> Encoder | Headed | CausalLanguageModel:
    """The folder's model with its head.

    Args:
        architecture: one of `ARCHITECTURES`; the folder's own by default.

    Raises:
        InputError: an architecture that is not implemented, or weights that do not fit it.
    """
    architecture = architecture or folder.architecture
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder.path}: architecture {architecture!r} is not implemented; known are {', '.join(ARCHITECTURES)}"
        )
    if folder.int8:
        raise InputError(f"{folder.path} holds int8 weights, which embed and nothing else; give the float model")
    head = ARCHITECTURES[architecture]
    if head is None:
        return load_encoder(folder, **options)
    state = _read_state(folder)
    with torch.device("meta"):
        model = head(_on_meta(folder.config, options))  # type: ignore[arg-type]  # a causal configuration's is a Decoder
    tied = isinstance(model, MaskedLanguageModel | CausalLanguageModel) and folder.config.tie_word_embeddings
    if tied:
        state.setdefault("decoder.weight", state.get(EMBEDDING, torch.empty(0)))
    _assign(model, state, folder, strict_names=True)
    if isinstance(model, MaskedLanguageModel | CausalLanguageModel) and tied:
        model.decoder.weight = model.model.embeddings.tok_embeddings.weight
    return model


def load_decoder(folder: ModelFolder, **options: Any) -> CausalLanguageModel:
    """A decoder with its next-token head; as `load_model`, of a folder read as a causal one."""
    model = load_model(folder, "ModernBertDecoderForCausalLM", **options)
    assert isinstance(model, CausalLanguageModel)
    return model


def _on_meta(config: EncoderConfig, options: dict[str, Any]) -> Encoder:
    """An encoder without memory behind it, its attention chosen for the device it will move to."""
    device = options.pop("device", "cpu")
    kind = Decoder if config.causal else Encoder
    encoder = kind(config, device="meta", **{**options, "attention": "blocks"})
    encoder.attention, encoder.attention_reason = choose_backend(
        options.get("attention", "auto"),
        device=torch.device(device),
        dtype=encoder.compute_dtype or torch.float32,
        head_size=config.head_size,
    )
    return encoder


def _read_state(folder: ModelFolder) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in folder.weight_files:
        try:
            with safe_open(file, framework="pt") as reader:
                for key in reader.keys():  # noqa: SIM118 (safe_open is no mapping)
                    state[key] = reader.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read as safetensors: {error}; fetch or save the model again") from error
    return state


def _assign(module: nn.Module, state: dict[str, Tensor], folder: ModelFolder, *, strict_names: bool) -> None:
    wanted = module.state_dict()
    if missing := sorted(set(wanted) - set(state)):
        raise InputError(
            f"{folder.path}: the weights lack {missing[0]!r} ({len(missing)} missing); they do not fit config.json"
        )
    heads = ("head.", "decoder.", "classifier.", "lm_head.")
    extra = sorted(k for k in set(state) - set(wanted) if strict_names or not k.startswith(heads))
    if extra:
        raise InputError(
            f"{folder.path}: the weights have {extra[0]!r} ({len(extra)} unknown); they do not fit config.json"
        )
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{folder.path}: {key} has shape {tuple(state[key].shape)}, config.json wants {tuple(tensor.shape)}; "
                "weights and config.json do not belong together"
            )
    module.load_state_dict({key: state[key] for key in wanted}, assign=True)


def save_folder(
    module: Encoder | Headed | CausalLanguageModel,
    path: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    pooling: str | None = None,
    dense: Sequence[DenseLayer | Dense] = (),
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    include_prompt: bool = True,
    max_tokens: int | None = None,
    truncate_dim: int | None = None,
    similarity_fn_name: str = "cosine",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a folder that `transformers`, and with `pooling` `sentence-transformers`, load. It appears whole or not
    at all.

    Args:
        module: an `Encoder` or a model with a head.
        path: must not exist yet, or be a folder to replace.
        tokenizer_from: a folder whose tokenizer files are copied.
        pooling: one of "mean", "cls", "last", "weighted_mean": writes the sentence-transformers files too, and what
            follows into them. `ModelFolder.sentence_options` gives all of it as another folder has it.
        dense: modules after the pooling, of another folder or of this process.
        max_tokens: beyond which texts are cut, said by the tokenizer files too; None is the configuration's.
        dtype: of the saved tensors; None keeps theirs.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = module if isinstance(module, Encoder) else module.model
    architecture = next(name for name, kind in ARCHITECTURES.items() if isinstance(module, kind or Encoder))
    config = encoder.config.to_hf() | {"architectures": [architecture]}
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in module.state_dict().items()}
    if encoder.config.tie_word_embeddings:
        tensors.pop("decoder.weight", None)
    file = SINGLE
    if isinstance(encoder.embeddings.tok_embeddings, QuantizedEmbedding):
        config["quantization_config"], file = {"quant_method": INT8}, INT8_FILE
    floating = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    config["dtype"] = str(floating).removeprefix("torch.")
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        staging.chmod(0o755)
        save_file(tensors, staging / file, metadata={"format": "pt"})
        (staging / file).chmod(0o644)  # safetensors writes it for its owner alone
        write_json(staging / "config.json", config)
        if tokenizer_from is not None:
            _copy_tokenizer(Path(tokenizer_from), staging, max_tokens or encoder.config.max_tokens)
        if pooling is not None:
            settings = {
                "prompts": prompts or {},
                "default_prompt_name": default_prompt_name,
                "similarity_fn_name": similarity_fn_name,
            } | ({"truncate_dim": truncate_dim} if truncate_dim else {})
            places = [f"2_Dense{number or ''}" for number in range(len(dense))]
            for place, layer in zip(places, dense, strict=True):
                loaded = load_dense([layer], None)[0] if isinstance(layer, DenseLayer) else layer
                save_dense(loaded, staging / place, dtype)
            _write_sentence_transformers(
                staging, encoder.config, pooling, places, normalize, include_prompt, max_tokens, settings
            )
        if path.exists():
            shutil.rmtree(path)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return path


def _copy_tokenizer(source: Path, target: Path, max_tokens: int) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    # The limit is that of the model which the tokenizer was made for.
    settings = read_json(target / "tokenizer_config.json", default={})
    if settings and settings.get("model_max_length") != max_tokens:
        write_json(target / "tokenizer_config.json", settings | {"model_max_length": max_tokens})


def _write_sentence_transformers(
    path: Path,
    config: EncoderConfig,
    pooling: str,
    dense: Sequence[str],
    normalize: bool,
    include_prompt: bool,
    max_tokens: int | None,
    settings: dict[str, Any],
) -> None:
    """The files of sentence-transformers 3 to 6, in the spelling that all of them read."""
    theirs = {ours: name for name, ours in POOLING_NAMES.items()}[pooling]
    flags = {"cls": "cls_token", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken"}
    last = f"{3 if dense else 2}_Normalize"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *((place, "Dense") for place in dense)]
    modules += [(last, "Normalize")] if normalize else []
    write_json(
        path / "modules.json",
        [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for i, (folder, kind) in enumerate(modules)
        ],
    )
    (path / "1_Pooling").mkdir()
    write_json(
        path / "1_Pooling" / "config.json",
        {"word_embedding_dimension": config.hidden_size, "include_prompt": include_prompt}
        | {f"pooling_mode_{flag}": name == theirs for name, flag in flags.items()},
    )
    if normalize:
        (path / last).mkdir()
        write_json(path / last / "config.json", {})
    write_json(
        path / "sentence_bert_config.json", {"max_seq_length": max_tokens or config.max_tokens, "do_lower_case": False}
    )
    write_json(path / "config_sentence_transformers.json", settings)
