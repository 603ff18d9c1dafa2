"""Model folders as Hugging Face and sentence-transformers write them: what they say, without loading a weight.

Loads no torch, so that the CPU stages of a pipeline can read prompts, pooling and tokenizer. Pickle is never opened.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import EncoderConfig
from model.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INT8 = "nightloom-int8"
"""What `quantization_config` in config.json calls int8 weights of `model.quantized`."""
INT8_FILE = "model.int8.safetensors"
"""Where they are. transformers passes over a quantization that it does not know, and would read integers as weights: it
finds no model.safetensors, and says so."""
NEEDED = ["*.json", "*.safetensors", "*/config.json"]

# sentence-transformers' pooling modes and ours; the older folders say them as booleans.
POOLING_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last", "weightedmean": "weighted_mean"}
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")
"""Of Dense modules."""


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """What a folder says of a Dense module: a linear map of the pooled vector and an activation (`model.dense`)."""

    file: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder's description."""

    path: Path
    config: EncoderConfig
    architecture: str
    """Hugging Face's class name, e.g. "ModernBertForMaskedLM"."""
    pooling: str = "mean"
    include_prompt: bool = True
    """Whether the tokens of a prompt are pooled with the text's."""
    dense: tuple[DenseLayer, ...] = ()
    """What a pooled vector goes through, in this order, before it is cut and normalised."""
    normalize: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    max_tokens: int = 8192
    truncate_dim: int | None = None
    similarity_fn_name: str = "cosine"
    """How vectors are to be compared, by sentence-transformers' name: "cosine", "dot", "euclidean" or "manhattan"."""
    weight_files: tuple[Path, ...] = ()
    int8: bool = False
    """Whether the weights are those of `model.quantized`."""

    @property
    def width(self) -> int:
        """Length of a vector before it is cut."""
        return self.dense[-1].out_features if self.dense else self.config.hidden_size

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return min(self.truncate_dim or self.width, self.width)

    def sentence_options(self) -> dict[str, Any]:
        """What `save_folder` must be told so that another folder makes vectors of sentences in the same way."""
        names = (
            "pooling",
            "dense",
            "normalize",
            "prompts",
            "default_prompt_name",
            "include_prompt",
            "max_tokens",
            "truncate_dim",
            "similarity_fn_name",
        )
        return {name: getattr(self, name) for name in names}


def resolve_folder(folder_or_id: str | os.PathLike[str]) -> Path:
    """A local folder as it is, or a hub id fetched with `huggingface_hub` (safetensors and JSON only).

    Raises:
        InputError: neither a folder nor an id that the hub, or its local cache, can give.
    """
    path = Path(folder_or_id)
    if path.is_dir():
        return path
    text = str(folder_or_id)
    looks_local = path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text
    if looks_local:
        raise InputError(
            f"no model folder at {text!r}; give a folder with config.json and model.safetensors, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=NEEDED))
    except Exception as error:  # the hub raises a dozen kinds, all of which mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no folder {text!r} here, nor on the hub ({reason[:160]}); check the name or the network"
        ) from error


def read_folder(folder_or_id: str | os.PathLike[str], *, causal: bool = False) -> ModelFolder:
    """Read what a Hugging Face or sentence-transformers folder says of itself.

    A folder without `modules.json` is a plain Hugging Face model: mean pooling, not normalised, as
    sentence-transformers has it.

    Args:
        causal: whether a decoder is wanted, and not an encoder.

    Raises:
        InputError: no model there, another architecture or kind, a module that is not supported.
    """
    path = resolve_folder(folder_or_id)
    modules = read_json(path / "modules.json", default=[])
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules]
    transformer = path / modules[kinds.index("Transformer")].get("path", "") if "Transformer" in kinds else path
    if not (transformer / "config.json").is_file():
        raise InputError(
            f"{path} holds no model: config.json is missing; give a Hugging Face or sentence-transformers folder"
        )
    hf = read_json(transformer / "config.json")
    try:
        config = EncoderConfig.from_hf(hf)
    except InputError as error:
        raise InputError(f"{transformer}: {error}") from error
    architecture = (hf.get("architectures") or ["ModernBertDecoderModel" if config.causal else "ModernBertModel"])[0]
    if config.causal != causal:
        found, wanted = ("an encoder", "a decoder") if causal else ("a decoder", "an encoder")
        raise InputError(f"{transformer} holds {found} ({architecture}); give the folder of {wanted}")
    int8 = _is_int8(hf, transformer)
    settings: dict[str, Any] = {}
    for module, kind in zip(modules, kinds, strict=True):
        options = read_json(path / module.get("path", "") / "config.json", default={}) if kind != "Transformer" else {}
        if kind == "Pooling":
            settings["pooling"] = _pooling(options, path)
            settings["include_prompt"] = bool(options.get("include_prompt", True))
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind == "Dense":
            if "pooling" not in settings or settings.get("normalize"):
                raise InputError(f"{path}/modules.json has a Dense module elsewhere than between Pooling and Normalize")
            before = settings.get("dense", ())
            width = before[-1].out_features if before else config.hidden_size
            settings["dense"] = (*before, _dense(path / module.get("path", ""), options, width))
        elif kind != "Transformer":
            raise InputError(
                f"{path}/modules.json has a {kind or 'nameless'} module; supported are Transformer, Pooling, Dense, "
                "Normalize"
            )
    st = read_json(path / "config_sentence_transformers.json", default={})
    settings["prompts"] = {k: v for k, v in (st.get("prompts") or {}).items() if isinstance(v, str)}
    settings["default_prompt_name"] = st.get("default_prompt_name")
    settings["truncate_dim"] = st.get("truncate_dim")
    settings["similarity_fn_name"] = st.get("similarity_fn_name") or "cosine"
    # As in sentence-transformers the tokenizer's limit counts where no other is stated; unlike there nothing goes
    # beyond the positions that the model was trained on.
    stated = read_json(transformer / "sentence_bert_config.json", default={}).get("max_seq_length")
    limit = stated or read_json(transformer / "tokenizer_config.json", default={}).get("model_max_length")
    return ModelFolder(
        path=transformer,
        config=config,
        architecture=architecture,
        max_tokens=min(config.max_tokens, int(limit or config.max_tokens)),
        weight_files=_weight_files(transformer, INT8_FILE if int8 else SINGLE),
        int8=int8,
        **settings,
    )


def _is_int8(hf: dict[str, Any], path: Path) -> bool:
    method = (hf.get("quantization_config") or {}).get("quant_method")
    if method not in (None, INT8):
        raise InputError(
            f"{path}: its weights are quantized by {method!r}, which is not read here; give the float model"
        )
    return method == INT8


def _pooling(options: dict[str, Any], path: Path) -> str:
    mode = options.get("pooling_mode")
    active = (
        mode if isinstance(mode, list) else [mode] if mode else [n for k, n in POOLING_FLAGS.items() if options.get(k)]
    )
    if not active:
        active = ["mean"]
    if len(active) != 1 or active[0] not in POOLING_NAMES:
        raise InputError(
            f"{path}: pooling {'+'.join(map(str, active))} is not supported; known are {', '.join(POOLING_NAMES)}"
        )
    return POOLING_NAMES[active[0]]


def _dense(path: Path, options: dict[str, Any], width: int) -> DenseLayer:
    """A Dense module's description.

    Args:
        width: of what comes before.
    """
    inner, outer = (options.get(name) for name in ("in_features", "out_features"))
    if not (isinstance(inner, int) and isinstance(outer, int) and outer > 0):
        raise InputError(f"{path}/config.json must say in_features and out_features; save the model again")
    if inner != width:
        raise InputError(f"{path} takes vectors of {inner} dimensions, and {width} come from the module before it")
    activation = str(options.get("activation_function") or "Identity").rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise InputError(f"{path}: activation {activation} is not supported; known are {', '.join(ACTIVATIONS)}")
    places = {options.get(name) or "sentence_embedding" for name in ("module_input_name", "module_output_name")}
    if places != {"sentence_embedding"} or options.get("use_residual"):
        raise InputError(f"{path}: a Dense module is supported from vector to vector, without a residual")
    if not (path / SINGLE).is_file():
        raise InputError(f"{path} has no weights: {SINGLE} is missing; convert the model to safetensors")
    return DenseLayer(path / SINGLE, inner, outer, bool(options.get("bias", True)), activation)


def _weight_files(path: Path, single: str) -> tuple[Path, ...]:
    if (path / single).is_file():
        return (path / single,)
    if (path / INDEX).is_file():
        names = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
        if any("/" in n or "\\" in n or not n.endswith(".safetensors") for n in names):
            raise InputError(
                f"{path / INDEX} names a file outside the folder or of another kind; only *.safetensors are read"
            )
        files = tuple(path / n for n in names)
        if absent := [f.name for f in files if not f.is_file()]:
            raise InputError(f"{path}: weight file {absent[0]} is named by {INDEX} and missing")
        return files
    extra = ", pickled weights are not read" if (path / "pytorch_model.bin").exists() else ""
    raise InputError(f"{path} has no weights: {single} is missing{extra}; convert the model to safetensors")


def read_json(path: Path, default: Any = None) -> Any:
    """What a JSON file holds: an object, or a list where `default` is one.

    Args:
        default: what to give where there is no such file; None refuses.

    Raises:
        InputError: missing, unreadable, or something else.
    """
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    kind = list if isinstance(default, list) else dict
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected a {kind.__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | os.PathLike[str]) -> "Tokenizer":
    """The folder's `tokenizer.json`, with its padding and truncation switched off: whoever packs decides about length.

    Raises:
        InputError: missing or unreadable.
    """
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path} has no tokenizer.json; save the tokenizer with transformers' fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises plain Exception
        raise InputError(f"{file} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_tokenizer(tokenizer: "Tokenizer", config: EncoderConfig, path: Path) -> None:
    """Refuse a tokenizer that would index past the embedding.

    Raises:
        InputError: the tokenizer has more entries than the weights have rows.
    """
    entries = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if entries > config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has ids up to {entries - 1}, the weights have {config.vocab_size} rows; "
            "they do not belong together"
        )


def weights_hash(path: str | os.PathLike[str]) -> str:
    """128-bit BLAKE2b, in hex, of the weight files' bytes and of the configuration that decides the arithmetic."""
    folder = read_folder(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in folder.weight_files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    for layer in folder.dense:
        digest.update(f"{layer.in_features} {layer.out_features} {layer.bias} {layer.activation}".encode())
        digest.update(layer.file.read_bytes())
    shape = {k: v for k, v in folder.config.to_hf().items() if k not in folder.config.extra}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_hash(path: str | os.PathLike[str]) -> str:
    """128-bit BLAKE2b, in hex, of `tokenizer.json`."""
    folder = read_folder(path)
    return hashlib.blake2b((folder.path / "tokenizer.json").read_bytes(), digest_size=16).hexdigest()
