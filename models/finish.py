"""What can be done to a trained model without training it.

    python -m models.finish average ONE_MODEL OTHER_MODEL OUT
    python -m models.finish whiten MODEL TOKENIZER UNITS.npz OUT [--power 0.35]

`average` takes the mean of two models of which one was trained out of the other: often better at everything than both.

`whiten` evens out the directions that vectors spread in, part of the way to white, and puts the strongest first, by a
Dense module. Vectors of contrastive models lie mostly in a few directions (here the covariance's largest eigenvalue is
13 times the mean one), and cosines say mostly what all texts of a kind have in common; dividing by a power of it lets
the others speak (whitening: arXiv 2103.15316 and 2104.01767, there all the way). MODEL is a folder that
models/make_small.py wrote, UNITS come from corpus/pairs.py. OUT has the same encoder.
"""

import argparse

import torch
from torch import Tensor

from corpus.pairs import Pairs
from model import Embedder
from model.dense import Dense
from models.make_small import encode, save, tell, with_ends

POWER = 0.35
"""Of the covariance that vectors are divided by: 0 leaves them, 0.5 is white. What the sets that are held out for
choices liked best in the mean; 0.3 and 0.4 do nearly the same, 0.5 is worse."""
LEAST = 1e-3
"""Added to every eigenvalue, as a share of the mean one: a direction may have none, as the last norm takes the mean off
every token."""


@torch.inference_mode()
def vectors_of(model: str, tokenizer_folder: str, units: str, *, batches: int = 120, size: int = 512) -> Tensor:
    """Unit vectors of questions and passages of the training share; one batch of four has longer passages."""
    pairs, embedder, found = Pairs(units, tokenizer_folder), Embedder(model), []
    for step in range(batches):
        short = step % 4 != 3
        questions, passages, _ = pairs.batch(6, step, size if short else size // 4, 128 if short else 640)
        for some in (questions, passages):
            found += [encode(embedder.encoder, with_ends(some[i : i + 16])) for i in range(0, len(some), 16)]
        tell(step, batches, 10, vectors=sum(map(len, found)))
    return torch.cat(found)


def whitening(vectors_RD: Tensor, power: float) -> Tensor:
    """What vectors are multiplied by, (D, D): C^-power, C their covariance, then a rotation to the directions that hold
    most of their energy, the first most of all, so that the first dimensions alone are worth most (Matryoshka).

    Scaled so that a vector keeps its length in the mean.
    """
    spread_D, directions_DD = torch.linalg.eigh(torch.cov(vectors_RD.double().T))
    gains_D = (spread_D.clamp(min=0) + LEAST * spread_D.mean()) ** -power
    weight_DD = directions_DD * gains_D @ directions_DD.T
    even_RD = vectors_RD.double() @ weight_DD
    _, order_DD = torch.linalg.eigh(even_RD.T @ even_RD)
    return (weight_DD @ order_DD.flip(1) / even_RD.norm(dim=1).mean()).float()


def whiten(model: str, tokenizer_folder: str, units: str, out: str, power: float = POWER) -> None:
    """Write OUT."""
    weight_DD = whitening(vectors_of(model, tokenizer_folder, units), power)
    dense = Dense(*weight_DD.shape, bias=False)
    with torch.no_grad():
        dense.linear.weight.copy_(weight_DD.T)
    save(Embedder(model, dtype="float32").encoder, out, tokenizer_folder, torch.float16, [dense])


def average(one: str, other: str, out: str) -> None:
    """The mean of the weights of two models of one shape, with the tokenizer of the first; no Dense module."""
    encoder, second = (Embedder(folder, dtype="float32").encoder for folder in (one, other))
    for name, tensor in second.state_dict().items():
        encoder.state_dict()[name].lerp_(tensor, 0.5)
    save(encoder, out, one, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, num_paths in (("average", 3), ("whiten", 4)):
        command = commands.add_parser(name)
        command.add_argument("paths", nargs=num_paths, help="in the order that stands above")
    command.add_argument("--power", type=float, default=POWER, help="of the covariance that vectors are divided by")
    options = parser.parse_args()
    if options.command == "average":
        average(*options.paths)
    else:
        whiten(*options.paths, power=options.power)


if __name__ == "__main__":
    main()
