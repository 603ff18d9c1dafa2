"""The commands of `nightloom` that make and try models: from token shards to a promoted folder."""

import argparse
from functools import partial

from jobs.commands import Commands, Report, add_command, add_settings


def add_model_commands(commands: Commands) -> None:
    """prepare, pretrain, finetune, mine, evaluate, promote, generate, quantize."""
    prepare = add_command(commands, "prepare", "turn a corpus into token shards to train on")
    prepare.add_argument("source", metavar="SOURCE", help="as for embed")
    prepare.add_argument("tokens", metavar="TOKENS", help="folder or s3:// prefix of the token shards")
    prepare.add_argument("--tokenizer", metavar="FOLDER", help="folder with tokenizer.json")
    prepare.add_argument("--train-tokenizer", metavar="SIZE", type=int, help="train a tokenizer of so many entries")
    add_settings(prepare, "jobs.configuration:PrepareConfiguration")
    prepare.set_defaults(run=run_prepare)
    pretrain = add_command(commands, "pretrain", "train an encoder on token shards, or go on with training")
    add_settings(pretrain, "jobs.phases:PretrainConfiguration", file="config")
    pretrain.set_defaults(run=run_pretrain)
    finetune = add_command(commands, "finetune", "train a model further on pairs, vectors, labels, tags or text")
    add_settings(finetune, "jobs.tuning:FinetuneConfiguration", file="config")
    finetune.set_defaults(run=run_finetune)
    mine = add_command(commands, "mine", "find hard negatives for pairs in an embedding table, for finetune")
    mine.add_argument("table", metavar="TABLE", help="folder or s3:// prefix of the table")
    mine.add_argument("queries", metavar="QUERIES", help="file with query, and positive_id or positive")
    mine.add_argument("output", metavar="OUT", help="Parquet file to write")
    mine.add_argument("--model", metavar="FOLDER", help="where the table's model lies now")
    add_settings(mine, "jobs.mine:MineConfiguration")
    mine.set_defaults(run=run_mine)
    evaluate = add_command(
        commands, "evaluate", "say what a model is worth: retrieval, similarity, classification, masking"
    )
    evaluate.add_argument("model", metavar="MODEL", help="model folder (s3:// too) or hub id; gets evaluation.json")
    add_settings(evaluate, "jobs.evaluation:EvaluateConfiguration", file="config", nargs="?")
    evaluate.add_argument("--output", metavar="FILE", help="write the JSON there too")
    evaluate.set_defaults(run=run_evaluate)
    promote = add_command(commands, "promote", "let a model be used if its evaluation passes the gates")
    promote.add_argument("model", metavar="MODEL", help="model folder (s3:// too) that was evaluated")
    promote.add_argument("destination", metavar="DESTINATION", help="folder or s3:// prefix that embed --model names")
    promote.add_argument("--gates", metavar="FILE", required=True, help="TOML file with [[gate]] tables")
    promote.set_defaults(run=run_promote)
    generate = add_command(commands, "generate", "go on from a prompt with a decoder; the text appears as it comes")
    generate.add_argument("model", metavar="MODEL", help="model folder (s3:// too) or hub id of a decoder")
    generate.add_argument("prompt", metavar="PROMPT", help="the beginning of a text, in quotes")
    for name, kind, default, meaning in (
        ("max-new-tokens", int, 128, "how many at most"),
        ("temperature", float, 0.0, "what logits are divided by; 0 takes the likeliest token"),
        ("top-k", int, 0, "choose among so many of the likeliest; 0 for all"),
        ("top-p", float, 1.0, "choose among the likeliest that together reach this share"),
        ("seed", int, 0, "the same seed gives the same text"),
    ):
        generate.add_argument(
            f"--{name}", metavar="N", type=kind, default=default, help=f"{meaning} (default: {default})"
        )
    generate.set_defaults(run=run_generate)
    quantize = add_command(commands, "quantize", "a model folder with int8 weights, if its vectors stay the same")
    quantize.add_argument("model", metavar="MODEL", help="model folder (s3:// too) or hub id of an encoder")
    quantize.add_argument("out", metavar="OUT", help="local folder to write; must not exist")
    quantize.add_argument("--sample", metavar="SOURCE", help="texts to compare on (default: the bundled corpus)")
    for name, meaning in (
        ("min-cosine", "least mean cosine to the float model"),
        ("min-centred", "the same, the mean vector taken off"),
    ):
        quantize.add_argument(f"--{name}", metavar="X", type=float, help=f"{meaning} (see jobs/quantize.py)")
    quantize.set_defaults(run=run_quantize)


def run_prepare(options: argparse.Namespace) -> Report:
    from jobs.configuration import PrepareConfiguration, load
    from jobs.prepare import run_prepare

    named = {name: getattr(options, name) for name in ("source", "tokens", "tokenizer", "train_tokenizer")}
    return run_prepare(load(PrepareConfiguration, file=options.config, sets=options.set, given=named))


def run_pretrain(options: argparse.Namespace) -> Report:
    from jobs.configuration import load
    from jobs.phases import PretrainConfiguration
    from jobs.pretrain import run_pretrain

    return run_pretrain(load(PretrainConfiguration, file=options.config, sets=options.set, given={}))


def run_finetune(options: argparse.Namespace) -> Report:
    from jobs.configuration import load
    from jobs.finetune import run_finetune
    from jobs.tuning import FinetuneConfiguration

    return run_finetune(load(FinetuneConfiguration, file=options.config, sets=options.set, given={}))


def run_mine(options: argparse.Namespace) -> Report:
    from jobs.configuration import load
    from jobs.mine import MineConfiguration, run_mine

    named = {name: getattr(options, name) for name in ("table", "queries", "output", "model")}
    return run_mine(load(MineConfiguration, file=options.config, sets=options.set, given=named))


def run_evaluate(options: argparse.Namespace) -> Report:
    from jobs.configuration import load
    from jobs.evaluate import run_evaluate
    from jobs.evaluation import EvaluateConfiguration

    given = {name: getattr(options, name) for name in ("model", "output")}
    return run_evaluate(load(EvaluateConfiguration, file=options.config, sets=options.set, given=given))


def run_promote(options: argparse.Namespace) -> Report:
    from jobs.promote import run_promote

    return run_promote(options.model, options.destination, options.gates)


def run_generate(options: argparse.Namespace) -> Report:
    from jobs.generate import run_generate

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    show = None if options.json else partial(print, end="", file=options.stdout, flush=True)
    return run_generate(options.model, options.prompt, show=show, **{name: getattr(options, name) for name in names})


def run_quantize(options: argparse.Namespace) -> Report:
    from jobs.quantize import run_quantize

    named = {name: getattr(options, name) for name in ("sample", "min_cosine", "min_centred")}
    given = {name: value for name, value in named.items() if value is not None}
    return run_quantize(options.model, options.out, **given)
