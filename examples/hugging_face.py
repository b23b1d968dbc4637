"""An encoder of Hugging Face transformers: dicts of arguments in, a ModelOutput out, and fit takes both.

python examples/hugging_face.py      # some seconds; needs the extra: pip install 'bqnn[examples]'

The network is a tiny BERT with random weights, so that nothing is downloaded; one from_pretrained is trained the same
way, by epochs=(0, 10, 4) and smaller learning rates. It is to find whether good words of a sentence outnumber bad ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import bqnn

LENGTH, WORDS, PAD = 10, 12, 0
GOOD = 5  # words from 1 on, of which the others are bad


def make_net() -> Any:
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ModuleNotFoundError as error:
        raise SystemExit("this example needs transformers: pip install 'bqnn[examples]'") from error
    words = {"vocab_size": WORDS, "max_position_embeddings": LENGTH}
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**words, **size, **dropout))


def draw(number: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Samples as a tokenizer gives them, each with its class."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(number):
        words = torch.randint(1, WORDS, (LENGTH,), generator=generator)
        length = int(torch.randint(5, LENGTH + 1, (), generator=generator))
        words[length:] = PAD
        is_good = ((words[:length] <= GOOD).float().mean() > 0.5).long()
        samples.append(({"input_ids": words, "attention_mask": (words != PAD).long()}, is_good))
    return samples


def main(sequences: int = 2000, epochs: int = 10) -> dict[str, float]:
    loader = DataLoader(draw(sequences, seed=1), batch_size=50, shuffle=True)
    held_out = DataLoader(draw(400, seed=2), batch_size=400)
    torch.manual_seed(0)
    rates: dict[str, Any] = {"lr": 1e-3, "deterministic_lr": 1e-3, "bayes_lr": 1e-3, "max_grad_norm": 1.0}
    options: dict[str, Any] = {"num_levels": 4, "skip": ["classifier"], "seed": 0, "log": print}
    result = bqnn.fit(make_net(), loader, validation=held_out, epochs=epochs, **rates, **options)

    small = bqnn.pack(result.net)
    inputs, classes = next(iter(held_out))
    right = (bqnn.predict(small, inputs).probs.argmax(1) == classes).float().mean().item()
    weights = bqnn.report(result.net).bits
    print(f"right {100 * right:.1f} %, at {weights:.2f} bits a weight; {type(small(**inputs)).__name__} as before")
    return {"right": right}


if __name__ == "__main__":
    main()
