"""Train the shipped tokenizer: `python -m cachetune.calibration.train_tokenizer`.

Byte-level BPE on the docstrings of the standard library and the project's own Markdown. The same
Python and the same Markdown give the same file; its provenance is written beside it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..core.record import write_atomic
from .corpus import docstrings_of, source_files
from .text import END_OF_TEXT, TOKENIZER_FILE

VOCAB_SIZE = 4096


def corpus() -> list[str]:
    """Texts in a fixed order."""
    texts = [
        f"{doc.title}\n\n{doc.text}\n"
        for module, path in source_files()
        for doc in docstrings_of(module, path)
    ]
    root = Path(__file__).parent.parent
    pages = sorted([*root.glob("*.md"), *root.glob("results/*.md")])
    return texts + [page.read_text(encoding="utf-8") for page in pages]


def train(texts: list[str]) -> Tokenizer:
    """A tokenizer whose decode(encode(text)) is the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Train, write the tokenizer and its provenance, print the provenance."""
    texts = corpus()
    tokenizer = train(texts)
    data = tokenizer.to_str().encode()
    provenance = {
        "command": "python -m cachetune.calibration.train_tokenizer",
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "vocab_size": tokenizer.get_vocab_size(),
        "n_texts": len(texts),
        "n_characters": sum(map(len, texts)),
        "corpus_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_atomic(TOKENIZER_FILE, data)
    beside = TOKENIZER_FILE.with_name("tokenizer_provenance.json")
    write_atomic(beside, (json.dumps(provenance, indent=2) + "\n").encode())
    print(json.dumps(provenance, indent=2))


if __name__ == "__main__":
    main()
